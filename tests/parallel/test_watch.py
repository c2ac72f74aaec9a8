"""What ranks tell each other outside collectives."""

import json
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

import eclip.parallel.watch
from eclip.parallel.rendezvous import Meeting
from eclip.parallel.signals import LAUNCHER_GONE
from eclip.parallel.watch import Failure, Watch, write_peer_error

MEMBERS = ("process 10 on a", "process 20 on b", "process 30 on c")


class _Ranks:
    """Watches of three ranks on one store."""

    def __init__(self) -> None:
        self.meeting = Meeting(store=dist.PrefixStore("attempt", dist.HashStore()), members=MEMBERS)
        self.started: list[Watch] = []
        self.stops: dict[int, int] = {}
        self.stopped = threading.Event()

    def start(self, rank: int, *, timeout: float = 60) -> Watch:
        def on_stop(number: int) -> None:
            self.stops[rank] = number
            self.stopped.set()

        watch = Watch(self.meeting, rank, timeout=timeout, on_stop=on_stop)
        self.started.append(watch)
        return watch


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Ranks]:
    monkeypatch.setattr(eclip.parallel.watch, "INTERVAL", 0.02)
    found = _Ranks()
    yield found
    for watch in found.started:
        watch.retire()


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set instead of the process's end."""
    event = threading.Event()

    def leave(status: int) -> None:
        assert status == 1
        event.set()
        raise RuntimeError("the thread ends here")

    monkeypatch.setattr(eclip.parallel.watch.os, "_exit", leave)
    return event


def test_the_first_that_fails_speaks_and_the_others_know_why(ranks: _Ranks) -> None:
    zero, one, two = (ranks.start(rank) for rank in range(3))
    assert zero.failure() is None
    assert one.publish_failure("error: no space left")
    assert not two.publish_failure("error: lost rank 1")
    assert one.failure() is None
    for other in (zero, two):
        failure = other.failure()
        assert failure is not None
        assert (failure.rank, failure.line) == (1, "error: no space left")


def test_a_stop_reaches_every_rank(ranks: _Ranks) -> None:
    zero, one = ranks.start(0), ranks.start(1)
    one.request_stop(signal.SIGUSR1)
    assert ranks.stopped.wait(30)
    assert ranks.stops == {0: signal.SIGUSR1}
    assert not zero.stop_agreed(wait=0.1), "rank 2 has not answered"
    two = ranks.start(2)
    assert all(watch.stop_agreed(wait=30) for watch in (zero, one, two))


def test_a_silent_rank_is_named_by_rank_0(
    ranks: _Ranks, left: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = ranks.start(1), ranks.start(2)
    one.retire()
    zero = ranks.start(0, timeout=0.3)
    assert left.wait(30)
    line = capfd.readouterr().err
    assert line.startswith("error: rank 1 (process 20 on b) gave no sign of life for 0.3 s")
    assert line.count("\n") == 1
    failure = two.failure(wait=30)
    assert failure is not None and failure.line == line.strip()
    assert zero.silent(wait=0.1) == [1] or zero.silent(wait=0.5) == [0, 1]


def test_rank_0_is_missed_by_all_and_named_once(
    ranks: _Ranks, left: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks.start(0).retire()
    ranks.start(1, timeout=0.2)
    ranks.start(2, timeout=0.2)
    assert left.wait(30)
    for watch in ranks.started:
        watch.retire()
    assert capfd.readouterr().err.count("rank 0 (process 10 on a) gave no sign of life") == 1


def test_a_rank_in_an_endless_collective_leaves_after_anothers_failure(
    ranks: _Ranks, left: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(eclip.parallel.watch, "_LEAVE_SECONDS", 0.05)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ranks.start(0).publish_failure("error: full disk")
    ranks.start(1)
    assert left.wait(30)
    assert "left because rank 0 failed" in (tmp_path / "error.json").read_text()


def test_a_suspended_job_blames_nobody(ranks: _Ranks) -> None:
    """Hours pass between two looks of every rank."""
    zero, one = ranks.start(0, timeout=30), ranks.start(1, timeout=30)
    for watch in (zero, one):
        watch.retire()
    for watch in (zero, one):
        watch._look(99, elapsed=7200.0)
        assert max(watch._ages.values()) < 1


def test_a_store_that_is_gone_stops_the_run(ranks: _Ranks) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))
    ranks.meeting = Meeting(store=client, members=MEMBERS)
    watch = ranks.start(1)
    del server
    assert ranks.stopped.wait(30)
    assert ranks.stops == {1: LAUNCHER_GONE}
    assert watch.failure() is None
    assert watch.publish_failure("error: lost")


def test_torchrun_shows_the_cause_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its root cause is the entry with the earliest time."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    write_peer_error(Failure(rank=3, line="error: full disk", when=1000.0))
    record = json.loads((tmp_path / "error.json").read_text())["message"]
    assert record == {"message": "left because rank 3 failed: error: full disk", "extraInfo": {"timestamp": "1001"}}
    place = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}  # rank 3 is on this node
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    write_peer_error(Failure(rank=3, line="error: full disk", when=1000.0))
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "left because rank 3 failed"
