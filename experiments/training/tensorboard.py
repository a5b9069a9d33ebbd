"""Scalars for TensorBoard, written by the thread that calls.

tensorboardX's own ``SummaryWriter`` writes in a thread of its own: on a full disk that thread ends with a traceback, and
the run waits for it forever. This one uses the writer below it, whose errors reach the caller.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

__all__ = ["EventFile"]


class EventFile:
    """A new file of events.

    Args:
      folder: where it goes; made if it is not there.
      step: the step that a run continues from. TensorBoard forgets what other files of the folder hold of later ones.

    Raises:
      OSError: from any of the methods, if the file cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{step}")
        self._writer.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add ``values`` at ``step``."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=scalars)))

    def flush(self) -> None:
        """Bring all events to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Bring all events to the disk and close the file."""
        self._writer.close()
