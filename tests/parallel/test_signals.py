"""Stop signals: noted, raised, insisted on, and a process that cannot answer."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from eclip.parallel.signals import LAUNCHER_GONE, STOP_SIGNALS, Stopped, StopSignals
from tests.helpers import rank_environment
from tests.processes import Processes

SIGNALS = pytest.mark.parametrize("number", STOP_SIGNALS)


@SIGNALS
def test_raises_outside_the_loop_and_is_noted_inside(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop, pytest.raises(Stopped, match=number.name):
        signal.raise_signal(number)
    with StopSignals() as stop:
        with stop.noted():
            signal.raise_signal(number)
            assert stop.signum == number
            with pytest.raises(Stopped), stop.interrupting():
                raise AssertionError("a wait that begins after the signal would never end")
    assert signal.getsignal(number) is before


def test_ends_a_wait() -> None:
    """Of the main thread in Python, as the wait for a batch is: told by another rank, or by a signal to a thread."""
    never = threading.Event()
    for number, send in (
        (LAUNCHER_GONE, lambda stop: stop.pass_on(LAUNCHER_GONE)),
        (signal.SIGTERM, lambda stop: signal.raise_signal(signal.SIGTERM)),
    ):
        with StopSignals() as stop, stop.noted():
            timer = threading.Timer(0.05, send, [stop])
            timer.start()
            with pytest.raises(Stopped), stop.interrupting():
                never.wait(60)
            timer.join()
            assert stop.signum == number


def test_an_error_that_leaves_the_loop_is_handled_in_peace() -> None:
    with StopSignals() as stop:
        with pytest.raises(RuntimeError), stop.noted():
            raise RuntimeError
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM


def test_the_request_is_told_once() -> None:
    told = []
    arrived = threading.Event()
    with StopSignals(repeated_by_launcher=True) as stop, stop.noted():
        stop.on_request = lambda number: (told.append(number), arrived.set())
        signal.raise_signal(signal.SIGUSR1)
        assert arrived.wait(30)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the queue's and torchrun's: one request, this process lives
        assert stop.signum == signal.SIGUSR1
    assert told == [signal.SIGUSR1]


INSIST = """
import signal, time
from eclip.parallel.signals import StopSignals
with StopSignals() as stop, stop.noted():
    print("ready", flush=True)
    while stop.signum is None:
        time.sleep(0.01)
    print("noted", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_at_once(first: signal.Signals) -> None:
    with Processes() as processes:
        process = processes.start([sys.executable, "-c", INSIST])
        processes.wait_for("ready")
        process.send_signal(first)
        processes.wait_for("noted")
        process.send_signal(signal.SIGTERM)
        if first == signal.SIGUSR1:  # a warning, after which SIGTERM is the first of its kind
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
        assert processes.wait(process) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert "a second time: stopped at once" in processes.output
        assert "Traceback" not in processes.output


STUCK = """
import ctypes
from eclip.parallel import signals
signals.GRACE_SECONDS = 0.2
with signals.StopSignals():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever, in C: no Python handler runs
"""


def test_a_process_that_cannot_answer_is_ended() -> None:
    with Processes() as processes:
        process = processes.start([sys.executable, "-c", STUCK])
        processes.wait_for("ready")
        process.send_signal(signal.SIGTERM)
        assert processes.wait(process) == 128 + signal.SIGTERM
        assert "SIGTERM not answered within 0.2 s" in processes.output


def test_forked_children_do_not_hold_the_end_up() -> None:
    """A data worker inherits the socket of the signals."""
    code = """
import os, time
from eclip.parallel.signals import StopSignals
with StopSignals():
    if os.fork() == 0:
        os.read(0, 1)
        os._exit(0)
print("left")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=rank_environment()
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"left\n"
    process.stdin.close()
    process.stdout.close()
    assert process.wait(60) == 0


def test_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was started to outlive its terminal does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signum is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_and_the_end_of_its_session_are_one_request() -> None:
    with StopSignals() as stop, stop.noted():
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):  # a second SIGTERM would end this process
            signal.raise_signal(number)
        assert stop.signum == signal.SIGHUP


def test_a_forked_worker_does_not_answer_for_its_parent() -> None:
    with StopSignals() as stop, stop.noted():
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.raise_signal(signal.SIGHUP)
            os._exit(stop.signum or 0)
        assert os.waitpid(child, 0)[1] == 0
        assert stop.signum is None


def test_what_a_destructor_swallows_is_raised_once_more() -> None:
    class Closing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("not reached")

    with StopSignals() as stop:
        told: list[int] = []
        stop.on_request = told.append
        Closing()
        assert stop.signum == signal.SIGTERM
        with pytest.raises(Stopped):
            threading.Event().wait(60)
    assert told == [signal.SIGTERM]
