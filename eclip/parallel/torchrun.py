"""What a launcher tells a rank (its place), and what torchrun wants from it: restarts, the error file, the exit status.

Without torchrun every function here has nothing to do and says so by its result.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from eclip.parallel.signals import LAUNCHER_GONE

ADVICE = "start ranks by torchrun, or set what it sets; for one process, unset it"
"""Where another launcher set the environment in part."""
_RECORD = "launch.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a launcher put this process; without a launcher it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_size: int = 1


def find_place() -> Place:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; an empty one counts as unset.

    Raises ValueError where a launcher other than torchrun set them in part, or to something else.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    for name, text in given.items():
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(f"{name}={text!r} in the environment: not a number from 0; {ADVICE}")
    rank, world_size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    for present, absent in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if (world_size > 1 or rank > 0) and absent not in given:
            raise ValueError(f"{present}={given[present]} in the environment without {absent}; {ADVICE}")
    if rank >= world_size:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={world_size} in the environment: ranks count from 0; {ADVICE}")
    local_rank = int(given["LOCAL_RANK"]) if "LOCAL_RANK" in given else None
    local_size = max(1, int(given.get("LOCAL_WORLD_SIZE", 1)))
    return Place(rank=rank, world_size=world_size, local_rank=local_rank, local_size=local_size)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def has_launcher() -> bool:
    """Whether torchrun or a queue's own launcher started this process as a rank."""
    return under_torchrun() or find_place().world_size > 1


def is_local(rank: int) -> bool:
    """Whether a rank has the same torchrun process as this one."""
    place = find_place()
    first = place.rank - (place.local_rank or 0)
    return first <= rank < first + place.local_size


def may_restart() -> bool:
    """Whether torchrun answers a failure by starting the ranks again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def restart_is_left() -> bool:
    """Whether torchrun will start the ranks again when they fail now."""
    return may_restart() and _restart_count() < int(os.environ["TORCHELASTIC_MAX_RESTARTS"])


def _restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def stopped_status(signum: int) -> int:
    """Exit status of a run that stopped by request: 128 + signal as in shells, 0 where torchrun would restart it.

    That a torchrun is gone is nobody's request: the others should restart.
    """
    return 0 if may_restart() and signum != LAUNCHER_GONE else 128 + signum


def write_error_file(message: str, *, when: float | None = None, traceback: str | None = None) -> None:
    """Give torchrun the line that its summary ends with: of the rank whose `when` (time.time()) is the earliest."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"timestamp": str(int(time.time() if when is None else when))}
        if traceback is not None:
            extra["py_callstack"] = traceback
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def mark_begun(run_dir: Path) -> None:
    """Note in the run folder that this launch began the run there."""
    if under_torchrun():
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = run_dir / f"{_RECORD}.partial"
        partial.write_text(json.dumps(_launch()), encoding="utf-8")
        partial.rename(run_dir / _RECORD)


def begun_by_this_launch(run_dir: Path) -> bool:
    """Whether an earlier attempt of this launch began the run in `run_dir`: a restart has the flags of the first start.

    The launch is the torchrun process; after a restart that a failure caused its run id suffices, because the ranks may
    have moved to other nodes.
    """
    if not under_torchrun():
        return False
    try:
        recorded = json.loads((run_dir / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(recorded, dict):
        return False
    mine = _launch()
    return recorded == mine or (_restart_count() > 0 and recorded.get("run_id") == mine["run_id"])


def _launch() -> dict[str, str]:
    agent = os.getppid()
    return {
        "run_id": os.environ["TORCHELASTIC_RUN_ID"],
        "agent": f"process {agent} on {socket.gethostname()}, started at {_start_time(agent)}",
    }


def _start_time(process: int) -> str:
    """Clock ticks from boot to the start of a process: with its number it names the process for good."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "an unknown time"
    return stat.rpartition(")")[2].split()[19]
