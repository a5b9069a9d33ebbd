"""Data: corpora that arrive inside packages or in the user's files, tokenizers, and endless deterministic batches."""
