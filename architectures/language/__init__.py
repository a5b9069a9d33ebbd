"""Language models."""

from manyheads.architectures.language.decoder import Decoder, DecoderConfig, DecoderState
from manyheads.architectures.language.presets import hybrid, lightning, smollm2, softmax, tiny

__all__ = ["Decoder", "DecoderConfig", "DecoderState", "hybrid", "lightning", "smollm2", "softmax", "tiny"]
