"""Language models with trained weights: SmolLM2, Llama checkpoints, saved decoders and training runs."""

from manyheads.experiments.pretrained.loading import TextModel, load_model
from manyheads.experiments.pretrained.smollm2 import load_smollm2

__all__ = ["TextModel", "load_model", "load_smollm2"]
