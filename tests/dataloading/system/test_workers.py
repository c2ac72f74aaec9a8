"""Data workers: killed, stopped, stalled, orphaned; whatever happens to them is one line and leaves no process."""

import errno
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from eclip.dataloading.errors import DataError
from eclip.dataloading.system.workers import Workers

SIZE = 1000


def count_up(number, slot):
    slot[:] = number % 256
    return str(number).encode()


def unpack(rest, slot):
    return int(rest), slot.copy()


def workers(make=count_up, **changes):
    options = {"first": 5, "count": 2, "ahead": 2, "slot_bytes": SIZE, "stall_seconds": 60}
    return Workers(make, **{**options, **changes})


@pytest.fixture(autouse=True)
def leaves_no_process():
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def gone(pid, seconds=30):
    """Whether a process is dead (perhaps not reaped by its new parent) within a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3])
def test_items_come_in_order(count, ahead):
    pool = workers(count=count, ahead=ahead)
    for expected in range(5, 40):
        number, slot = pool.take(unpack)
        assert number == expected and np.all(slot == expected)
    pool.close()


def test_item_larger_than_any_pipe():
    pool = workers(lambda number, slot: bytes(5_000_000), count=1)
    assert pool.take(lambda rest, slot: len(rest)) == 5_000_000
    pool.close()


def test_workers_stay_ahead_by_so_much(tmp_path):
    def make(number, slot):
        (tmp_path / str(number)).touch()
        return b"x"

    pool = workers(make, count=2, ahead=2)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 4)
    pool.take(lambda rest, slot: None)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 5)
    pool.close()


class Odd(ValueError):
    """An error that cannot be made again from its text."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("train-000000.tar: short"), DataError, "train-000000.tar: short"),
        (OSError(5, "Input/output error", "f"), OSError, "Input/output error"),
        (Odd("a", "b"), DataError, "a b"),
        (MemoryError("no 9 GiB"), MemoryError, "no 9 GiB"),
        (KeyError("k"), RuntimeError, "in make"),
    ],
)
def test_error_of_an_item_comes_in_its_turn(error, kind, text):
    def make(number, slot):
        if number == 7:
            raise error
        return count_up(number, slot)

    pool = workers(make)
    assert [pool.take(unpack)[0] for _ in range(2)] == [5, 6]
    with pytest.raises(kind, match=text) as caught:
        pool.take(unpack)
    assert type(caught.value) is kind
    pool.close()


def no_item(number, slot):
    time.sleep(600)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "SIGKILL: most often .* out-of-memory"),
        (signal.SIGBUS, "SIGBUS: memory"),
        (signal.SIGSEGV, "SIGSEGV: a decoder"),
    ],
)
def test_killed_worker(number, words):
    pool = workers(no_item)
    os.kill(pool._workers[0].process.pid, number)
    with pytest.raises(DataError, match=rf"step 5: data worker 1 of 2 \(pid \d+\) was killed by {words}") as error:
        pool.take(unpack)
    assert "\n" not in str(error.value)
    pool.close()


def test_worker_that_leaves():
    pool = workers(lambda number, slot: os._exit(3))
    with pytest.raises(DataError, match="ended with status 3"):
        pool.take(unpack)
    pool.close()


def test_worker_killed_between_items():
    pool = workers(ahead=1)
    pool.take(unpack)
    os.kill(pool._workers[1].process.pid, signal.SIGKILL)
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)
    taken = (pool.take(unpack) for _ in range(9))
    with pytest.raises(DataError, match="killed by SIGKILL"):
        list(taken)
    pool.close()


def test_stopped_worker_is_named_and_does_not_keep_anyone():
    pool = workers(no_item, stall_seconds=0.3)
    pid = pool._workers[0].process.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=rf"step 5: no batch within 0\.3 s .*is stopped .*kill -CONT {pid}") as error:
        pool.take(unpack)
    assert "\n" not in str(error.value) and "--stall-seconds" in str(error.value)
    pool.close()
    assert gone(pid)


def test_slow_worker_is_named():
    pool = workers(no_item, stall_seconds=0.2)
    with pytest.raises(DataError, match="data worker 1 of 2 .* is still at it: a slow store"):
        pool.take(unpack)
    pool.close()


def test_worker_stopped_in_the_middle_of_an_item():
    pool = workers(lambda number, slot: bytes(5_000_000), count=1, stall_seconds=0.3)
    worker = pool._workers[0]
    wait_until(lambda: worker.socket.recv(1, 2))  # MSG_PEEK: it has begun, and waits for us to read
    os.kill(worker.process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="is stopped"):
        pool.take(unpack)
    pool.close()


def test_fork_of_the_parent_that_ends_leaves_the_workers_alone():
    pool = workers(ahead=1)
    child = multiprocessing.get_context("fork").Process(target=pool.close)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert [pool.take(unpack)[0] for _ in range(6)] == list(range(5, 11))
    pool.close()


def test_garbage_of_the_parent_is_left_to_it():
    """A DALI pipeline that is part of a cycle, say: its destructor would wait for ever for threads that no fork has."""
    destroyed_by = []

    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            destroyed_by.append(os.getpid())

    def make(number, slot):
        gc.collect()
        return str(len(destroyed_by)).encode()

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        Cycle()
        pool = workers(make)
        assert not gc.isenabled()
        assert [pool.take(lambda rest, slot: int(rest)) for _ in range(4)] == [0] * 4
        gc.collect()
        assert destroyed_by == [os.getpid()]
        gc.enable()
        more = workers()
        assert gc.isenabled()
        for one in (pool, more):
            one.close()
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_death_of_a_worker_that_nobody_may_wait_for(monkeypatch):
    """A launcher that ignores SIGCHLD hands that down; the kernel then keeps no status."""
    pool = workers(no_item)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "exitcode", None)
        pool._workers[0].process.kill()
        with pytest.raises(DataError, match=r"data worker 1 of 2 \(pid \d+\) has died \(of what is not known"):
            pool.take(unpack)
    pool.close()


def test_closing_does_not_wait_for_full_pipes():
    pool = workers(lambda number, slot: bytes(5_000_000), count=3)
    wait_until(lambda: all(worker.socket.recv(1, 2) for worker in pool._workers))
    pool.close()
    pool.close()


class Stop(BaseException):
    pass


def test_signal_ends_the_wait_of_the_parent_and_not_its_workers():
    def stop(number, frame):
        raise Stop

    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    before = {signal.Signals[name]: signal.signal(signal.Signals[name], stop) for name in names}
    try:
        pool = workers(lambda number, slot: no_item(0, 0) if number == 6 else b"0")
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        pids = [worker.process.pid for worker in pool._workers]
        pool.take(unpack)
        for number in before:
            timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
            timer.start()
            with pytest.raises(Stop):
                pool.take(unpack)
            for pid in pids:
                os.kill(pid, number)
        assert all(worker.process.is_alive() for worker in pool._workers)
        with open(f"/proc/{pids[0]}/status") as file:
            facts = dict(line.split(":", 1) for line in file)
        ignored, blocked = int(facts["SigIgn"], 16), int(facts["SigBlk"], 16)
        assert all(ignored >> (n - 1) & 1 and not blocked >> (n - 1) & 1 for n in before)
        pool.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ORPHANS = """
import os, sys, threading, time
from eclip.dataloading.system.workers import Workers
def make(number, slot):
    if sys.argv[1] == "slow":
        time.sleep(600)
    return bytes(5_000_000)
def start():
    global pool
    pool = Workers(make, first=0, count=2, ahead=2, slot_bytes=10, stall_seconds=0)
    print(*(worker.process.pid for worker in pool._workers), flush=True)
"""
ENDS = {
    "killed": "start(); time.sleep(600)",
    "exit": "start(); os._exit(1)",
    "returns": "start()",
    "in a thread": "t = threading.Thread(target=start); t.start(); t.join(); sys.stdin.read(); os._exit(0)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize(("how", "work"), [*((how, "full") for how in ENDS), ("killed", "slow")])
def test_workers_die_with_their_parent(how, work):
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS + ENDS[how], work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if how == "killed":
            parent.kill()
        if how == "in a thread":
            assert not gone(pids[0], 0.2)  # the thread that forked them has ended; they have not
            parent.stdin.close()
        assert parent.wait(60) == {"killed": -9, "exit": 1}.get(how, 0)
        assert all(gone(pid) for pid in pids)


def test_memory_that_cannot_be_had():
    with pytest.raises(DataError, match="memory for its batches .*--num-workers"):
        workers(slot_bytes=1 << 60)


def test_files_that_cannot_be_had(monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    with pytest.raises(DataError, match=r"worker 1 of 2 cannot be started .*--num-workers or .*\(ulimit -n\)"):
        workers()


def test_processes_that_cannot_be_had(monkeypatch):
    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", refuse)
    with pytest.raises(DataError, match="data worker 1 of 2 cannot be started"):
        workers()
