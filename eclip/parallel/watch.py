"""What ranks tell each other outside collectives: that they live, that one failed and why, that one was told to stop.

A thread of every rank writes a sign of life to the store of the attempt once a second. Rank 0 looks at all of them, the
others look at rank 0. So a stopped process or a vanished machine is named, which no collective's timeout does, and host
work may take hours without one.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eclip.parallel.rendezvous import Meeting
from eclip.parallel.signals import LAUNCHER_GONE
from eclip.parallel.torchrun import is_local, under_torchrun, write_error_file

INTERVAL = 1.0
_LEAVE_SECONDS = 10.0  # between another rank's failure and the end of a main thread that stands in a collective


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank failed, as it told the others."""

    rank: int
    line: str
    when: float
    """time.time() there."""


class PeerFailed(RuntimeError):
    """Another rank failed and has said why; this one leaves without a word."""


class Watch:
    """One rank's view of the others. The thread runs from construction to `retire`."""

    def __init__(self, meeting: Meeting, rank: int, *, timeout: float, on_stop: Callable[[int], None]) -> None:
        """timeout: seconds without a sign of life after which a rank counts as lost.

        on_stop: called in the thread with a signal's number when another rank was told to stop, or when the launcher is
        gone.
        """
        self.rank, self.members, self.timeout, self.store = rank, meeting.members, timeout, meeting.store
        self._on_stop = on_stop
        # A client each: a call that waits inside the store holds up every other call of the same client.
        self._mine, self._theirs = (meeting.store.clone() for _ in range(2))  # type: ignore[attr-defined]  # no stub
        self._parent = os.getppid()
        self._failure: Failure | None = None
        self._failed_at: float | None = None
        self._stop: int | None = None
        self._stop_published = False
        self._beats: dict[int, bytes] = {}
        self._ages = dict.fromkeys(range(1, len(self.members)) if rank == 0 else [0], 0.0)
        self._wake, self._retired = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    # --- of the main thread

    def publish_failure(self, line: str) -> bool:
        """Tell the others; whether this rank is the first that failed, and so the one that speaks."""
        mine = json.dumps({"rank": self.rank, "line": line, "when": time.time()})
        try:
            return self._mine.compare_set("failure", "", mine).decode() == mine
        except RuntimeError:
            return self.rank <= 1  # the store went with rank 0 or its launcher: the next one speaks

    def failure(self, *, wait: float = 0.0) -> Failure | None:
        """Another rank's failure, if one is known within `wait` seconds."""
        deadline = time.monotonic() + wait
        while True:
            try:
                if self._mine.check(["failure"]):
                    found = Failure(**json.loads(self._mine.get("failure")))
                    return found if found.rank != self.rank else None
            except RuntimeError:
                return None
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    def request_stop(self, signum: int) -> None:
        """Tell the others that this rank was told to stop; from any thread."""
        self._stop = signum
        self._wake.set()

    def stop_agreed(self, *, wait: float) -> bool:
        """Whether every rank knows, within `wait` seconds, that the run is to stop.

        The store may go with rank 0, which therefore waits as long again until the others have read it there.
        """
        try:
            if not self._all_have("stopping", wait):
                return False
            self._mine.set(f"agreed/{self.rank}", "")
            if self.rank == 0:
                self._all_have("agreed", wait)
        except RuntimeError:
            return False
        return True

    def _all_have(self, what: str, wait: float) -> bool:
        """Whether every rank has set this key of its within `wait` seconds. Raises RuntimeError without a store."""
        deadline = time.monotonic() + wait
        keys = [f"{what}/{rank}" for rank in range(len(self.members))]
        while not self._mine.check(keys):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def silent(self, *, wait: float) -> list[int]:
        """Ranks that give no sign of life for `wait` seconds; [] too when the store cannot tell."""
        try:
            before = self._read_beats(range(len(self.members)))
            time.sleep(wait)
            after = self._read_beats(range(len(self.members)))
        except RuntimeError:
            return []
        return [rank for rank in after if rank != self.rank and before[rank] == after[rank]]

    def name(self, ranks: Sequence[int]) -> str:
        """ "rank 1 (process 4711 on node3)"."""
        shown = ", ".join(f"rank {rank} ({self.members[rank]})" for rank in ranks[:4])
        return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    def retire(self) -> None:
        """End the thread, before the ranks part: one that is done is not lost."""
        self._retired = True
        self._wake.set()
        self._thread.join()

    # --- of the thread

    def _run(self) -> None:
        beat, looked = 0, time.monotonic()
        while not self._retired:
            beat += 1
            if under_torchrun() and os.getppid() != self._parent:  # torchrun is gone, perhaps with the store
                self._on_stop(self._stop or LAUNCHER_GONE)
                return
            try:
                self._look(beat, time.monotonic() - looked)
            except RuntimeError:  # the store is gone, with rank 0 or with the launcher
                self._on_stop(self._stop or LAUNCHER_GONE)
                return
            looked = time.monotonic()
            self._wake.wait(INTERVAL)
            self._wake.clear()

    def _look(self, beat: int, elapsed: float) -> None:
        self._theirs.set(f"beat/{self.rank}", str(beat))
        if self._stop is None and self._theirs.check(["stop"]):
            self._stop = int(self._theirs.get("stop"))
            self._on_stop(self._stop)
        if self._stop is not None and not self._stop_published:
            self._theirs.set("stop", str(self._stop))
            self._theirs.set(f"stopping/{self.rank}", "")
            self._stop_published = True
        if self._failure is None and self._theirs.check(["failure"]):
            self._failure, self._failed_at = Failure(**json.loads(self._theirs.get("failure"))), time.monotonic()
        if self._failed_at is not None and time.monotonic() - self._failed_at > _LEAVE_SECONDS:
            self._leave_behind()
        self._look_at_others(elapsed)

    def _look_at_others(self, elapsed: float) -> None:
        # When the whole job was suspended for hours, nobody is to blame afterwards.
        elapsed = min(elapsed, 2 * INTERVAL)
        found = self._read_beats(list(self._ages))
        for rank, beat in found.items():
            self._ages[rank] = self._ages[rank] + elapsed if beat == self._beats.get(rank) else 0.0
        self._beats = found
        lost = [rank for rank, age in self._ages.items() if age > self.timeout]
        if lost:
            line = (
                f"error: {self.name(lost)} gave no sign of life for {self.timeout:g} s: the process is stopped or its "
                f"machine is gone, and the run stops; --rank-timeout-seconds sets how long to wait"
            )
            mine = json.dumps({"rank": self.rank, "line": line, "when": time.time()})
            if self._theirs.compare_set("failure", "", mine).decode() == mine:
                os.write(2, f"{line}\n".encode())
                write_error_file(line)
            os._exit(1)  # the main thread may stand in a collective that never ends

    def _read_beats(self, ranks: Sequence[int] | range) -> dict[int, bytes]:
        keys = [f"beat/{rank}" for rank in ranks]
        known = self._theirs if threading.current_thread() is self._thread else self._mine
        if known.check(keys):
            return dict(zip(ranks, known.multi_get(keys), strict=True))
        return {r: known.get(key) if known.check([key]) else b"" for r, key in zip(ranks, keys, strict=True)}

    def _leave_behind(self) -> None:
        assert self._failure is not None
        if self._failure.rank != self.rank:
            write_peer_error(self._failure)
            os._exit(1)


def write_peer_error(failure: Failure) -> None:
    """torchrun's entry of a rank that left because of another: later than the cause, which its summary ends with.

    The summary is of one node: it repeats the line of a rank of another one.
    """
    why = f"left because rank {failure.rank} failed"
    write_error_file(why if is_local(failure.rank) else f"{why}: {failure.line}", when=failure.when + 1)
