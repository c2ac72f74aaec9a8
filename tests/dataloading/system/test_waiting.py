"""Waits with a limit."""

import threading

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


def beside(work, seconds=60.0, setup=lambda: None):
    return Beside(work, what=lambda: "step 3: late", stall_seconds=seconds, setup=setup)


def test_beside_gives_results_and_errors_in_order():
    answers = iter([1, KeyError("bad"), 2])

    def work():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    thread = beside(work)
    assert thread.take() == 1
    with pytest.raises(KeyError, match="bad"):
        thread.take()
    assert thread.take() == 2
    thread.close()


def test_beside_works_only_when_asked_and_in_one_thread():
    names = []
    thread = beside(lambda: names.append(threading.current_thread().name), setup=lambda: names.append("set up"))
    thread.take()
    thread.take()
    thread.close()
    assert names == ["set up", "batches", "batches"]


def test_beside_names_a_call_that_hangs():
    release = threading.Event()
    thread = beside(release.wait, seconds=0.1)
    with pytest.raises(DataError, match="step 3: late"):
        thread.take()
    release.set()
    thread.close()
