"""Waits with a limit."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from eclip.dataloading.errors import DataError
from eclip.dataloading.system import waiting
from eclip.dataloading.system.waiting import Beside, wait_for


class Clock:
    """time.monotonic that only moves when a wait says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(waiting.time, "monotonic", lambda: self.now)

    def never(self, seconds):
        self.now += seconds
        return False


@pytest.mark.parametrize("limit", [0.25, 1, 7.5])
def test_limit_is_kept(monkeypatch, limit):
    clock = Clock(monkeypatch)
    assert not wait_for(clock.never, limit)
    assert limit <= clock.now <= limit + 1


def test_no_limit(monkeypatch):
    clock = Clock(monkeypatch)
    assert wait_for(lambda seconds: clock.never(seconds) or clock.now > 1e6, 0)


def test_time_in_which_the_job_was_suspended_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    asked = []

    def suspended(seconds):
        asked.append(seconds)
        clock.now += 10_000
        return False

    assert not wait_for(suspended, 10)
    assert len(asked) == 5


def beside(work, seconds=60.0, ahead=2, **changes):
    return Beside(work, ahead=ahead, what=lambda: "step 3: late", stall_seconds=seconds, **changes)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_beside_gives_results_in_order_and_an_error_in_its_place():
    made = []

    def work():
        made.append(len(made))
        if len(made) == 3:
            raise KeyError("bad")
        return made[-1]

    thread = beside(work, ahead=9)
    wait_until(lambda: len(made) == 3)
    assert [thread.take(), thread.take()] == [0, 1]
    with pytest.raises(KeyError, match="bad"):
        thread.take()
    thread.end()
    assert len(made) == 3  # nothing is called after an error


@pytest.mark.parametrize("ahead", [1, 3])
def test_beside_is_so_far_ahead_in_one_thread(ahead):
    names = []

    def tell(name):
        return lambda: names.append(name)

    thread = beside(
        lambda: names.append(threading.current_thread().name),
        ahead=ahead, setup=tell("set up"), teardown=tell("torn down"),
    )  # fmt: skip
    for taken in range(4):
        wait_until(lambda: len(names) == 1 + taken + ahead)  # noqa: B023 (called before the next turn)
        time.sleep(0.02)
        assert len(names) == 1 + taken + ahead
        thread.take()
    thread.end()
    assert names[0] == "set up" and names[-1] == "torn down" and set(names[1:-1]) == {"batches"}


def test_beside_passes_an_error_of_its_beginning_on():
    def setup():
        raise OSError("no device")

    thread = beside(lambda: 1, setup=setup)
    with pytest.raises(OSError, match="no device"):
        thread.take()
    thread.end()


def test_closing_waits_for_nobody_and_stops_the_call():
    stopped, torn_down = threading.Event(), threading.Event()
    thread = beside(lambda: stopped.wait(60), stop=stopped.set, teardown=torn_down.set)
    start = time.monotonic()
    thread.close()
    assert time.monotonic() - start < 10
    assert torn_down.wait(60)


def test_end_does_not_wait_for_what_hangs():
    release = threading.Event()
    thread = beside(lambda: release.wait(60), hangs=lambda: True)
    start = time.monotonic()
    thread.end()
    assert time.monotonic() - start < 30
    release.set()


class Stop(BaseException):
    pass


def test_a_signal_ends_the_wait():
    def stop(number, frame):
        raise Stop

    release = threading.Event()
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        thread = beside(lambda: release.wait(60), seconds=0)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(Stop):
            thread.take()
    finally:
        signal.signal(signal.SIGUSR1, before)
        release.set()
        thread.close()


@pytest.mark.parametrize("closed", ["", "b.close(); del b"])
def test_a_program_ends_after_the_call(closed):
    """Not in its middle: a call of C++ code would end the program with an abort."""
    script = (
        "import time\nfrom eclip.dataloading.system.waiting import Beside\n"
        "b = Beside(lambda: time.sleep(0.5), ahead=9, what=str, stall_seconds=0, teardown=lambda: print('torn down'))\n"
        f"b.take()\n{closed}\nprint('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\ntorn down\n"), done.stderr


def test_beside_names_a_call_that_hangs():
    release = threading.Event()
    thread = beside(release.wait, seconds=0.1)
    with pytest.raises(DataError, match="step 3: late"):
        thread.take()
    release.set()
    thread.close()
