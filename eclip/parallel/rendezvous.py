"""How ranks find each other: a store of their own for every attempt.

torchrun restarts a failed group of ranks on the store that it already has, and torch 2.13 gives an attempt no prefix of
its own: what a dead attempt left there, addresses above all, misleads the next one (gloo's connectFullMesh fails).
Counting attempts does not help either: after a restart the agents of two nodes may count differently. So rank 0 invents
a name for the attempt, the others answer under it, and each goes on only when rank 0 has named it among the members.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from eclip.parallel.torchrun import ADVICE

_ATTEMPT = "eclip/attempt"
_PAUSE = 0.05  # seconds between two looks at the store; a wait inside it would hold signals up
_PATIENCE = 5.0  # longer than rank 0, which knows who is missing and says so
_CONFIRM = 10.0  # seconds for the members to confirm; a member that died meanwhile makes a new round


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The ranks of one attempt."""

    store: dist.Store
    """Keys that no other attempt sees."""
    members: Sequence[str]
    """Who each rank is, for messages: "process 4711 on node3"."""


def meet(rank: int, world_size: int, *, timeout: float) -> Meeting:
    """Find the other ranks through the store that the environment announces (MASTER_ADDR, MASTER_PORT, ...).

    Raises ValueError naming the ranks that did not come within `timeout` seconds, or the store that cannot be reached.
    """
    deadline = time.monotonic() + timeout
    host, port = _store_address(world_size)
    try:
        if rank > 0:
            _await_store(host, port, deadline)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout)))
    except (dist.DistError, OSError) as error:
        way_out = "see whether rank 0 runs and that address can be reached from here"
        if "EADDRINUSE" in str(error):
            way_out = "another program listens there: choose another MASTER_PORT (torchrun --standalone finds one)"
        reason = f"within {timeout:g} s ({_first_line(error)})"
        raise ValueError(f"rank {rank}: no rendezvous at {host}:{port} {reason}; {way_out}") from error
    return meet_in(store, rank, world_size, deadline=deadline)


def _store_address(world_size: int) -> tuple[str, int]:
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host:
        raise ValueError(f"WORLD_SIZE={world_size} in the environment without MASTER_ADDR; {ADVICE}")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"MASTER_PORT={port!r} in the environment: not a port from 1 to 65535; {ADVICE}")
    return host, int(port)


def _await_store(host: str, port: int, deadline: float) -> None:
    """Return when somebody listens there. Raises OSError, the last attempt's, at `deadline`.

    The store's own client would wait as well, and print 40 lines of C++ frames when that is in vain.
    """
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(_PAUSE, deadline - time.monotonic())):
                return
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE)


def meet_in(store: dist.Store, rank: int, world_size: int, *, deadline: float) -> Meeting:
    """The handshake alone; `deadline` is a value of time.monotonic()."""
    # The last part tells two processes of the same number apart: containers and restarts reuse them.
    me = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}"
    if rank == 0:
        room, members = _lead(store, me, world_size, deadline)
    else:
        room, members = _follow(store, me, rank, deadline + _PATIENCE)
    return Meeting(store=dist.PrefixStore("ranks", room), members=[member.rsplit(" ", 1)[0] for member in members])


def _lead(store: dist.Store, me: str, world_size: int, deadline: float) -> tuple[dist.Store, list[str]]:
    others = range(1, world_size)
    while True:
        attempt = uuid.uuid4().hex
        room = dist.PrefixStore(f"eclip/{attempt}", store)
        store.set(_ATTEMPT, attempt)
        missing = _missing(room, "here", others, deadline)
        if missing:
            raise ValueError(
                f"of {world_size} ranks {_ranks(missing)} did not come in time; "
                f"see the output of their nodes, or raise --rank-timeout-seconds where nodes start later"
            )
        members = [me, *(room.get(f"here/{rank}").decode() for rank in others)]
        room.set("members", json.dumps(members))
        if not _missing(room, "confirmed", others, min(deadline, time.monotonic() + _CONFIRM)):
            room.set("begin", "")
            return room, members


def _follow(store: dist.Store, me: str, rank: int, deadline: float) -> tuple[dist.Store, list[str]]:
    answered = None
    while time.monotonic() < deadline:
        if store.check([_ATTEMPT]):
            attempt = store.get(_ATTEMPT).decode()
            room = dist.PrefixStore(f"eclip/{attempt}", store)
            if attempt != answered:
                room.set(f"here/{rank}", me)
                answered = attempt
            elif room.check(["members"]):
                members = json.loads(room.get("members"))
                if members[rank : rank + 1] == [me]:  # else the list of an attempt that is over
                    room.set(f"confirmed/{rank}", "")
                    if room.check(["begin"]):
                        return room, members
        time.sleep(_PAUSE)
    raise ValueError(
        f"rank {rank}: the ranks did not all come in time; rank 0 names the missing ones, unless it is missing itself; "
        f"raise --rank-timeout-seconds where nodes start later"
    )


def _missing(room: dist.Store, key: str, ranks: Sequence[int], deadline: float) -> list[int]:
    """Wait until every rank has set `key`; those that have not by then."""
    while not room.check([f"{key}/{rank}" for rank in ranks]):
        if time.monotonic() > deadline:
            return [rank for rank in ranks if not room.check([f"{key}/{rank}"])]
        time.sleep(_PAUSE)
    return []


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"{len(numbers)} ({shown})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
