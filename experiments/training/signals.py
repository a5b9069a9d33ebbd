"""Signals that ask a run to stop, as a flag that the run looks at when it can."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["stop_signals"]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and SIGINT into a flag for as long as the context lasts; a second one acts as always.

    Yields:
      A function that says whether one has come. In a thread other than the main one, which gets no signals, it says no.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, stop)
    try:
        yield lambda: bool(stopped)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
