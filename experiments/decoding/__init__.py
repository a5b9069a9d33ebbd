"""Generation: sampling from logits, and decoding of batches of prompts."""
