"""SIGTERM, in this process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mmdense.engine import stopping
from mmdense.engine.stopping import Stopped, StopSignal


def test_a_signal_is_noted_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    told = StopSignal(keep=pytest.fail)
    with told:
        assert not told.wanted()
        told.after_val_iter(None, 0)
        for _ in range(2):  # as torchrun sends it on
            os.kill(os.getpid(), signal.SIGTERM)
        assert told.wanted()
        with pytest.raises(Stopped):
            told.after_val_iter(None, 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_takes_no_signals():
    entered = []

    def enter():
        with StopSignal(keep=pytest.fail) as told:
            entered.append(told.wanted())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [False]


@pytest.mark.slow
def test_a_second_signal_ends_at_once():
    code = """if True:
    import os, signal
    from mmdense.engine import stopping
    stopping.ECHO = 0.0
    with stopping.StopSignal(keep=None):
        os.kill(os.getpid(), signal.SIGTERM)
        print('first', flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print('second')
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'first\n'
    assert done.returncode == -signal.SIGTERM


def test_the_status_is_that_of_a_shell():
    assert stopping.STATUS == 143
