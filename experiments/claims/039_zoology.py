"""Claim of Zoology (2023): attention recalls, a gated convolution with fixed filters does not.

On multi-query associative recall (256 tokens, length 64, 8 pairs, 20,000 training sequences, batch 128) a decoder of two
layers with 64 features learns to answer the queries within 3 epochs if it mixes by softmax attention, and does not within 16
if it mixes by BaseConv, a short filter in one layer and a long one in the other.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

from manyheads.architectures.language.decoder import DecoderConfig
from manyheads.experiments.claims.harness import Claim, Measurement
from manyheads.experiments.tasks.language_model import MQARTask
from manyheads.experiments.tasks.mqar import MQARData
from manyheads.experiments.training.metrics import read_metrics
from manyheads.experiments.training.optimizer import OptimizerConfig
from manyheads.experiments.training.trainer import TrainerConfig, train

MODELS = {
    "attention": (3, ("softmax",)),
    "base_conv": (16, ("base_conv(filter='short')", "base_conv(filter='long', max_length=64)")),
}

# As in the paper's code: PyTorch's AdamW, whose weight decay acts on all parameters.
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant", b2=0.999, decay_vectors=True)


def run(budget: float, seed: int, progress: Callable[[str], None]) -> Measurement:
    """Train both models for their epochs, times ``budget``, and test them after each part of an epoch."""
    data = MQARData()
    epoch = data.train_examples / data.batch_size
    curves = {}
    for name, (epochs, mixers) in MODELS.items():
        model = DecoderConfig(
            d_model=64, num_layers=2, mixers=mixers, num_heads=1, position="learned", feed_forward="none", norm="layer"
        )
        steps = max(1, round(epochs * epoch * budget))
        progress(f"{name}: {steps} steps")
        with tempfile.TemporaryDirectory() as folder:
            config = TrainerConfig(steps=steps, seed=seed, eval_every=max(1, steps // 10), save_every=steps)
            train(MQARTask(model, data, seed), config, OPTIMIZER, Path(folder), {})
            lines = [line for line in read_metrics(Path(folder)) if "eval_accuracy" in line]
        curves[name] = [(line["step"] / epoch, line["eval_accuracy"]) for line in lines]
    accuracy = {name: curve[-1][1] for name, curve in curves.items()}
    return Measurement(
        figures={f"{name}_accuracy": value for name, value in accuracy.items()},
        holds=accuracy["attention"] > 0.95 and accuracy["base_conv"] < 0.4,
        headline=f"accuracy: attention {accuracy['attention']:.3f}, BaseConv {accuracy['base_conv']:.3f}",
        plot=partial(_plot, curves),
    )


def _plot(curves: dict[str, list[tuple[float, float]]], file: Path) -> None:
    """Accuracy against epochs."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points), marker="o", label=name.replace("base_conv", "BaseConv (3, long)"))
    axes.axhline(1 / 128, color="grey", lw=0.8, ls=":", label="guessing a value")
    axes.set(xlabel="epoch", ylabel="accuracy on the queries", ylim=(0, 1.02), title="MQAR: 8 pairs, length 64")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


CLAIM = Claim(
    paper="039",
    title="Attention recalls, a gated convolution with fixed filters does not",
    statement="MQAR accuracy of softmax attention > 0.95 after 3 epochs, of BaseConv < 0.4 after 16",
    code=(
        "manyheads.layers.attention.softmax",
        "manyheads.layers.convolution",
        "manyheads.architectures.language.decoder",
        "manyheads.experiments.tasks.mqar",
        "manyheads.experiments.analysis.ar_slices",
    ),
    run=run,
)
