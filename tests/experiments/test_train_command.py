"""``manyheads train`` with its real tasks at tiny size, in this process and in others that are killed and stopped."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_training import outcome

from manyheads.experiments import cli
from manyheads.experiments.training.metrics import read_metrics

MODEL = ("--model.d-model", "16", "--model.num-layers", "1", "--model.num-heads", "2")
LOOP = ("--log-every", "1", "--save-every", "3", "--eval-every", "4")
MQAR = (
    *("mqar", "--steps", "10", *LOOP, *MODEL, "--data.length", "16", "--data.pairs", "2", "--data.vocab-size", "32"),
    *("--data.train-examples", "100", "--data.test-examples", "24", "--data.batch-size", "8"),
)


@pytest.fixture
def text(tmp_path) -> tuple[str, ...]:
    """The arguments of a run on a text of its own."""
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be, that is the question.\n" * 60)
    return (
        *("text", "--steps", "10", *LOOP, *MODEL, "--model.mixers", "softmax", "--sample-tokens", "8"),
        *("--data.path", str(file), "--data.seq-len", "16", "--data.batch-size", "4", "--data.validation-tokens", "64"),
    )


@pytest.fixture
def manyheads(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    log = logging.getLogger("manyheads")
    before, log.handlers = log.handlers, []  # the command makes one, on the stderr of this test

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["train", *argv])
        return code, *capsys.readouterr()

    yield run
    log.handlers = before


def start(*argv: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "manyheads.experiments.cli", "train", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    while process.poll() is None and max((line["step"] for line in read_metrics(out)), default=0) < step:
        time.sleep(0.001)


def test_mqar_is_trained_and_found_finished(tmp_path, manyheads):
    out = tmp_path / "run"
    code, stdout, stderr = manyheads(*MQAR, "--out", str(out))
    last = read_metrics(out)[-1]
    evaluated = [line.split(":")[0] for line in stderr.splitlines() if "eval_loss" in line]
    assert code == 0 and evaluated == ["step 4", "step 8", "step 10"]
    assert stdout.startswith(f"eval_accuracy {last['eval_accuracy']:.4f}, eval_loss {last['eval_loss']:.4f}\n")
    assert "loss.png" in stdout and "summary.json" in stdout
    description = json.loads((out / "config.json").read_text())
    assert description["task"] == "mqar" and description["data"]["pairs"] == 2
    code, again, stderr = manyheads(*MQAR, "--out", str(out))
    assert (code, again, stderr) == (0, stdout, f"{out} is finished: 10 steps\n")


def test_killed_mqar_ends_like_an_undisturbed_one(tmp_path, manyheads, rng):
    assert manyheads(*MQAR, "--out", str(tmp_path / "undisturbed"))[0] == 0
    out = tmp_path / "killed"
    process = start(*MQAR, "--out", str(out))
    wait_for_step(process, out, int(rng.integers(1, 10)))
    process.kill()
    process.communicate()
    assert manyheads(*MQAR, "--out", str(out))[0] == 0
    assert outcome(out) == outcome(tmp_path / "undisturbed")


def test_stopped_text_ends_like_an_undisturbed_one(tmp_path, text, manyheads, rng):
    code, stdout, _ = manyheads(*text, "--out", str(tmp_path / "undisturbed"))
    sample = (tmp_path / "undisturbed/sample.txt").read_text()
    assert code == 0 and sample.startswith("ROMEO.\n") and sample in stdout
    out = tmp_path / "stopped"
    process = start(*text, "--out", str(out))
    wait_for_step(process, out, 1)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 0 and "Traceback" not in stderr
    if stderr.splitlines()[-1].startswith("stopped at step"):
        assert not (out / "summary.json").exists()
    assert manyheads(*text, "--out", str(out))[0] == 0
    assert outcome(out) == outcome(tmp_path / "undisturbed")
    assert (out / "sample.txt").read_text() == sample


@pytest.mark.parametrize(
    "argv, message",
    [
        (("mqra",), "unknown task 'mqra'. Did you mean 'mqar'? Allowed: mqar, text"),
        ((*MQAR, "--stepps", "3"), "unknown field '--stepps'. Did you mean '--steps'? Allowed: "),
        ((*MQAR, "--steps", "0"), "steps=0 must be at least 1"),
        ((*MQAR, "--keep", "1"), "keep=1 must be at least 2"),
        ((*MQAR, "--optimizer.learning-rate", "-1"), "learning_rate=-1.0 must be positive"),
        ((*MQAR, "--optimizer.b2", "1"), "b2=1.0 must be at least 0 and less than 1"),
        ((*MQAR, "--optimizer.weight-decay", "inf"), "optimizer.weight_decay=inf must be finite"),
        ((*MQAR, "--data.pairs", "9"), "pairs=9 is more than a quarter of length=16"),
        ((*MQAR, "--data.batch-size", "0"), "batch_size=0 must be positive"),
        ((*MQAR, "--model.num-heads", "3"), "num_heads=3 does not divide d_model=16"),
        ((*MQAR, "--model.mixers", "softmx"), "unknown mixer 'softmx'. Did you mean 'softmax'? Allowed: "),
        ((*MQAR, "--preset"), "--preset is missing its value. Allowed: "),
        ((*MQAR, "--preset", "softmxa"), "unknown architecture 'softmxa'. Did you mean 'softmax'? Allowed: "),
        (("text", "--data.path", "/nowhere/at/all"), "path='/nowhere/at/all' does not exist"),
        (("text", "--data.tokenizer", "word"), "unknown --data.tokenizer 'word'. Allowed: bpe, byte"),
    ],
)
def test_mistake_is_one_line_and_leaves_no_folder(argv, message, tmp_path, manyheads):
    out = tmp_path / "a/run"
    code, stdout, stderr = manyheads(*argv, *(() if argv[-1] == "--preset" else ("--out", str(out))))
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"manyheads: error: {message}") and stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file_is_one_line(tmp_path, manyheads):
    (tmp_path / "out").write_text("precious")
    code, stdout, stderr = manyheads(*MQAR, "--out", str(tmp_path / "out"))
    assert (code, stdout) == (2, "") and stderr.startswith(f"manyheads: error: out='{tmp_path}/out': ")
    assert stderr.count("\n") == 1 and (tmp_path / "out").read_text() == "precious"


def test_other_settings_are_one_line(tmp_path, manyheads):
    argv = (*MQAR, "--steps", "1", "--out", str(tmp_path / "run"))
    assert manyheads(*argv)[0] == 0
    code, _, stderr = manyheads(*argv, "--model.d-model", "32")
    assert code == 2 and stderr.count("\n") == 1
    assert f"out='{tmp_path}/run' holds a run with model.d_model=16, not 32: " in stderr
    assert manyheads(*argv, "--keep", "5", "--log-every", "7", "--save-every", "9")[0] == 0


def test_preset_is_where_the_model_starts(tmp_path, manyheads):
    argv = (*MQAR[:3], "--data.test-examples", "8", "--data.train-examples", "8", "--data.batch-size", "8")
    code, *_ = manyheads(
        *argv, "--preset", "tiny", "--model.d-model", "16", "--steps", "1", "--out", str(tmp_path / "x")
    )
    model = json.loads((tmp_path / "x/config.json").read_text())["model"]
    from manyheads.architectures import architecture_info

    preset = architecture_info("tiny").preset()
    assert code == 0 and model["d_model"] == 16 and model["num_layers"] == preset.num_layers
    assert model["mixers"] == list(preset.mixers)


def test_help_names_tasks_presets_and_options(manyheads):
    for argv in ((), ("--help",)):
        code, stdout, _ = manyheads(*argv)
        assert code == 0 and "  text " in stdout and "  mqar " in stdout and "presets: " in stdout
    code, stdout, _ = manyheads("text", "--help")
    assert code == 0 and all(f"--{name}" in stdout for name in ("steps", "out", "data.path", "optimizer.b1"))
