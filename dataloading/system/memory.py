"""How much memory a process may still take: of the machine, and of its control groups (containers, jobs)."""

from collections.abc import Iterator
from pathlib import Path


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be had without swapping or being killed; None where the system does not say (not Linux).

    The least of the kernel's MemAvailable and what the limits of this process's control groups, version 1 or 2, and of
    all groups above them leave. Pages of files count as free: they are dropped for whoever needs memory.
    """
    found = [*_of_machine(proc), *_of_groups(proc, groups)]
    return max(0, min(found)) if found else None


def _of_machine(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) << 10


def _of_groups(proc: Path, groups: Path) -> Iterator[int]:
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left(groups, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _left(groups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _left(root: Path, path: str, limit: str, used: str, prefix: str) -> Iterator[int]:
    """Of the group and those above it. In a container the path may be the host's: then the root is the group's own."""
    place = root / path.strip("/")
    for group in (place, *place.parents):
        most, now = _number(group / limit), _number(group / used)
        if most is not None and now is not None:
            facts = dict(line.split() for line in _lines(group / "memory.stat"))
            yield most - now + sum(int(facts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        if group == root:
            return


def _number(file: Path) -> int | None:
    """None where there is no such file, or "max" in it."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
