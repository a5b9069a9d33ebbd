import contextlib
import json
import os
import struct

import matplotlib.image
import pytest
from tensorboardX.proto.event_pb2 import Event

from manyheads.experiments.training.metrics import Metrics, plot_losses, read_metrics


def events(folder):
    """The events of all files of a folder, in the order of the files' names."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_lines_hold_the_values_exactly(tmp_path, rng):
    losses = [float(x) for x in rng.standard_normal(20).astype("float32")]
    with Metrics(tmp_path, 0) as metrics:
        for step, loss in enumerate(losses, start=1):
            metrics.write(step, {"loss": loss})
    assert read_metrics(tmp_path) == [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


def test_tensorboard_gets_the_values_and_what_is_only_shown(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(1, {"loss": 0.5, "accuracy": 0.25})
        metrics.show(1, {"tokens_per_second": 8.0})
    found = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    assert found == [(1, "loss", 0.5), (1, "accuracy", 0.25), (1, "tokens_per_second", 8.0)]
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "accuracy": 0.25}]


def test_continuing_cuts_later_lines_and_tells_tensorboard(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": 1.0})
    with Metrics(tmp_path, 3) as metrics:
        metrics.write(4, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    purges = [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert purges == [1, 4]


def test_flushed_lines_are_in_the_file(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.flush()
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("end", [b"", b'{"step": 2, "lo', b'{"step": 2, "loss": 1.0}', "é".encode()[:1]])
def test_last_line_that_was_cut_off_is_left_out(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' + end)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_damaged_line_is_one_clear_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a line is damaged") as caught:
        read_metrics(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_metrics_are_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError), Metrics(tmp_path, 0) as metrics:
        metrics.write(1, {"loss": float("nan")})
    assert read_metrics(tmp_path) == []


@contextlib.contextmanager
def metrics_on_full_disk(out):
    """Metrics with a line that no disk takes."""
    with Metrics(out, 0) as metrics:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, metrics._stream.fileno())
        os.close(full)
        metrics.write(1, {"loss": 1.0})
        yield metrics


def test_full_disk_is_an_error_that_hides_no_other(tmp_path):
    with pytest.raises(OSError, match="No space left"), metrics_on_full_disk(tmp_path) as metrics:
        metrics.flush()
    with pytest.raises(OSError, match="No space left"), metrics_on_full_disk(tmp_path):
        pass  # closing writes
    with pytest.raises(KeyError), metrics_on_full_disk(tmp_path):
        raise KeyError


def test_plot_is_an_image_of_both_losses(tmp_path):
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path)
    one = matplotlib.image.imread(tmp_path / "loss.png")
    assert one.shape == (480, 840, 4) and one.std() > 0.01
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19, "eval_loss": 0.5}\n')
    plot_losses(tmp_path)
    assert (matplotlib.image.imread(tmp_path / "loss.png") != one).any()
