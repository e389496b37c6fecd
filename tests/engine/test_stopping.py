"""SIGTERM in this process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mmdense.engine import stopping
from mmdense.engine.stopping import Stopped, StopSignal


def test_a_signal_is_recorded_and_the_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(save=pytest.fail)
    with stop:
        assert not stop.received()
        stop.after_val_iter(None, 0)
        for _ in range(2):  # torchrun forwards it
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received()
        with pytest.raises(Stopped):
            stop.after_val_iter(None, 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_handle_no_signals():
    received = []

    def enter():
        with StopSignal(save=pytest.fail) as stop:
            received.append(stop.received())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert received == [False]


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once():
    code = """if True:
    import os, signal
    from mmdense.engine import stopping
    stopping.ECHO = 0.0
    with stopping.StopSignal(save=None):
        os.kill(os.getpid(), signal.SIGTERM)
        print('first', flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print('second')
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'first\n'
    assert done.returncode == -signal.SIGTERM
    assert stopping.STATUS == 143  # as shells report it
