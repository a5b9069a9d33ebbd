"""Named decoders as settings."""

from manyheads.architectures.language.decoder import DecoderConfig
from manyheads.architectures.registry import register_architecture

__all__ = ["hybrid", "lightning", "smollm2", "softmax", "tiny"]


@register_architecture("tiny", title="Attention Is All You Need", year=2017)
def tiny() -> DecoderConfig:
    """Two small layers, softmax and lightning, for tests and smoke runs."""
    return DecoderConfig(d_model=32, num_layers=2, num_heads=2, mixers=("softmax", "lightning"), max_length=128)


@register_architecture("softmax", title="LLaMA: Open and Efficient Foundation Language Models", year=2023)
def softmax() -> DecoderConfig:
    """A byte-level model with softmax attention in every layer, about 0.8 M parameters."""
    return DecoderConfig()


@register_architecture(
    "lightning",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
)
def lightning() -> DecoderConfig:
    """A byte-level model with lightning attention in every layer: its decode state does not grow."""
    return DecoderConfig(mixers=("lightning",))


@register_architecture("hybrid", title="MiniMax-01: Scaling Foundation Models with Lightning Attention", year=2025)
def hybrid() -> DecoderConfig:
    """A byte-level model with one softmax layer after every three of lightning attention."""
    return DecoderConfig(mixers=("lightning", "lightning", "lightning", "softmax"))


@register_architecture("smollm2", title="SmolLM2: When Smol Goes Big", year=2025)
def smollm2() -> DecoderConfig:
    """SmolLM2-135M, of the Llama architecture."""
    return DecoderConfig(
        vocab_size=49152,
        d_model=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        hidden=1536,
        rope_base=100000.0,
        norm_eps=1e-5,
        max_length=8192,
    )
