import os
import signal
import threading

import pytest

from manyheads.experiments.training.signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_flag(number):
    before = signal.getsignal(number)
    with stop_signals() as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert stopping()
    assert signal.getsignal(number) is before


def test_second_interrupt_interrupts():
    with pytest.raises(KeyboardInterrupt), stop_signals() as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping()
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_get_no_signals():
    answers = []

    def work():
        with stop_signals() as stopping:
            answers.append(stopping())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False] and signal.getsignal(signal.SIGTERM) is before
