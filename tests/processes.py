"""Ranks of a test that must be signalled, stopped or killed: started, read while they run, and gone afterwards."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.helpers import ROOT, free_port, rank_environment


class Processes:
    """Context: commands with one common output. Whatever they started is killed when it ends."""

    def __init__(self, *, timeout: float = 120) -> None:
        self._deadline = time.monotonic() + timeout
        self._log: IO[bytes] = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.running:
            for pid in [process.pid, *self.children(process)]:
                _kill(pid)
            process.wait()

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=rank_environment(env),
            cwd=ROOT,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def start_ranks(self, command: Sequence[str], ranks: int = 2) -> list[subprocess.Popen[bytes]]:
        """One process a rank, without torchrun: nobody ends the others when one fails."""
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"LOCAL_WORLD_SIZE": str(ranks)}
        return [self.start(command, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]

    def start_torchrun(self, *args: str, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        return self.start([*launcher, *args])

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def wait_for(self, pattern: str, *, times: int = 1) -> None:
        """Until the output holds `pattern` so many times; AssertionError with the output when that never comes."""
        while len(re.findall(pattern, self.output)) < times:
            ended = all(process.poll() is not None for process in self.running)
            assert not ended and time.monotonic() < self._deadline, f"{pattern!r} does not come:\n{self.output}"
            time.sleep(0.02)

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit status."""
        try:
            return process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.output}") from None

    def children(self, process: subprocess.Popen[bytes]) -> dict[int, int]:
        """Process number to rank (-1: none) of every descendant that is alive."""
        found: dict[int, int] = {}
        parents = {process.pid}
        for _ in range(3):
            for pid, parent in _processes().items():
                if parent in parents:
                    found[pid] = int(_environment(pid).get("RANK", -1))
            parents |= set(found)
        return found


def alive(pids: Sequence[int]) -> list[int]:
    """Those that still run; a moment is given to what is just ending."""
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if pid in _processes()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _processes() -> dict[int, int]:
    """Process number to parent's, without zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
