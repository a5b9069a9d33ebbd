"""Generation: sampling from logits, and decoding of batches of prompts."""

from manyheads.experiments.decoding.generate import Generated, generate
from manyheads.experiments.decoding.sampling import sample

__all__ = ["Generated", "generate", "sample"]
