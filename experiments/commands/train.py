"""``manyheads train TASK``: train a decoder on text or on associative recall."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manyheads.architectures import architecture_info, architecture_names
from manyheads.architectures.language.decoder import DecoderConfig
from manyheads.experiments.arguments import parse
from manyheads.experiments.data.text import TextData
from manyheads.experiments.tasks.language_model import MQARTask, TextTask
from manyheads.experiments.tasks.mqar import MQARData
from manyheads.experiments.training.optimizer import OptimizerConfig
from manyheads.experiments.training.task import Task
from manyheads.experiments.training.trainer import TrainerConfig, train
from manyheads.layers.mixer import unknown_name

__all__ = ["MQARRun", "TextRun", "run"]


@dataclass(frozen=True)
class TextRun(TrainerConfig):
    """Train a language model on text.

    Attributes:
      out: folder of the run; a run that is there already is continued.
      model: the decoder; --preset NAME before it starts from a named architecture.
      data: the text.
      optimizer: AdamW.
      sample_prompt: what the text shown at the end begins with.
      sample_tokens: its length.
    """

    out: str = "runs/text"
    model: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(mixers=("lightning", "lightning", "lightning", "softmax"))
    )
    data: TextData = field(default_factory=TextData)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=5e-3))
    sample_prompt: str = "ROMEO.\n"
    sample_tokens: int = 400

    def task(self) -> TextTask:
        """The task of this run."""
        return TextTask(self.model, self.data, self.seed, self.sample_prompt, self.sample_tokens)


@dataclass(frozen=True)
class MQARRun(TrainerConfig):
    """Train a language model on multi-query associative recall.

    Attributes:
      out: folder of the run; a run that is there already is continued.
      model: the decoder; --preset NAME before it starts from a named architecture.
      data: the sequences.
      optimizer: AdamW.
    """

    steps: int = 470
    out: str = "runs/mqar"
    model: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            d_model=64, num_layers=2, num_heads=1, position="learned", feed_forward="none", norm="layer"
        )
    )
    data: MQARData = field(default_factory=MQARData)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(schedule="constant", b2=0.999))

    def task(self) -> MQARTask:
        """The task of this run."""
        return MQARTask(self.model, self.data, self.seed)


RUNS = {"text": TextRun, "mqar": MQARRun}


def run(argv: list[str]) -> int:
    """Run ``manyheads train`` with these arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: manyheads train TASK [--preset NAME] [options]\n\ntasks:")
        for name, kind in RUNS.items():
            print(f"  {name:8}{kind.__doc__.splitlines()[0]}")
        print(f"\npresets: {', '.join(architecture_names())}")
        print("manyheads train TASK --help lists the options of a task.")
        return 0
    name, *rest = argv
    if name not in RUNS:
        raise unknown_name("task", name, RUNS)
    kind = RUNS[name]
    default, rest = _preset(kind(), rest)
    settings = parse(kind, rest, prog=f"manyheads train {name}", description=kind.__doc__, default=default)
    task: Task = settings.task()
    trainer = TrainerConfig(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainerConfig)})
    out = Path(settings.out)
    result = train(task, trainer, settings.optimizer, out, {"task": name, **dataclasses.asdict(settings)})
    if result.finished:
        _report(out, result.metrics)
    return 0


def _preset(default: Any, argv: list[str]) -> tuple[Any, list[str]]:
    """Take ``--preset NAME`` out of the arguments and put that architecture into the defaults."""
    if "--preset" not in argv:
        return default, argv
    at = argv.index("--preset")
    if at + 1 == len(argv):
        raise ValueError(f"--preset is missing its value. Allowed: {', '.join(architecture_names())}")
    preset = architecture_info(argv[at + 1]).preset()
    return replace(default, model=preset), argv[:at] + argv[at + 2 :]


def _report(out: Path, metrics: dict[str, float]) -> None:
    """Say where the results are, and show the sample if there is one."""
    print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if (out / "sample.txt").exists():
        print(f"\n{(out / 'sample.txt').read_text(encoding='utf-8')}")
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
