"""Ranks find each other on a store that dead attempts have used."""

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

import eclip.parallel.rendezvous
from eclip.parallel.rendezvous import Meeting, meet, meet_in
from tests.helpers import free_port


def _meet(store: dist.Store, ranks: range | list[int], world_size: int, *, seconds: float = 60) -> Callable[[], dict]:
    """Start the handshake of some ranks in threads; the returned function waits for their meetings or errors."""
    results: dict[int, Meeting | ValueError] = {}

    def one(rank: int) -> None:
        try:
            results[rank] = meet_in(store, rank, world_size, deadline=time.monotonic() + seconds)
        except ValueError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()

    def join() -> dict[int, Meeting | ValueError]:
        for thread in threads:
            thread.join()
        return results

    return join


def _assert_one_room(meetings: dict[int, Meeting]) -> None:
    meetings[0].store.set("found", "by all")
    for meeting in meetings.values():
        assert isinstance(meeting, Meeting)
        assert meeting.store.get("found") == b"by all"
        assert meeting.members == meetings[0].members
        assert all(member.startswith("process ") and " on " in member for member in meeting.members)


@pytest.mark.parametrize("world_size", [2, 5])
def test_every_attempt_has_keys_of_its_own(world_size: int) -> None:
    store = dist.HashStore()
    for _ in range(3):
        meetings = _meet(store, range(world_size), world_size)()
        assert not meetings[world_size - 1].store.check(["found"])
        _assert_one_room(meetings)


def test_a_rank_that_died_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list then names the dead one; the members confirm, so rank 0 notices and asks again."""
    monkeypatch.setattr(eclip.parallel.rendezvous, "_CONFIRM", 0.3)
    monkeypatch.setattr(eclip.parallel.rendezvous, "_PATIENCE", 0.0)
    store = dist.HashStore()
    join_rest = _meet(store, [0, 2], 3)
    store.wait(["eclip/attempt"])
    first = store.get("eclip/attempt").decode()
    room = dist.PrefixStore(f"eclip/{first}", store)
    room.set("here/1", "process 1 on a dead node")
    room.wait(["members"])
    join_late = _meet(store, [1], 3)
    _assert_one_room(join_rest() | join_late())
    assert store.get("eclip/attempt").decode() != first


def test_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eclip.parallel.rendezvous, "_PATIENCE", 0.0)
    results = _meet(dist.HashStore(), [0, 2], 4, seconds=0.3)()
    assert "of 4 ranks 2 (1, 3) did not come in time" in str(results[0])
    assert "rank 2: the ranks did not all come in time; rank 0 names" in str(results[2])


def test_no_store(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(ValueError, match=f"rank 1: no rendezvous at 127.0.0.1:{port} within 0.5 s"):
        meet(1, 2, timeout=0.5)
    assert capfd.readouterr().err == ""  # no frames of C++ before the one line


def test_another_program_at_the_port_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ValueError, match="EADDRINUSE.*choose another MASTER_PORT"):
            meet(0, 2, timeout=0.5)


@pytest.mark.parametrize(
    "host, port, words",
    [("", "29500", "without MASTER_ADDR"), ("node1", "", "MASTER_PORT=''"), ("node1", "99999", "99999")],
)
def test_no_address_of_a_store(host: str, port: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=f"{words}.*start ranks by torchrun"):
        meet(1, 2, timeout=0.5)
