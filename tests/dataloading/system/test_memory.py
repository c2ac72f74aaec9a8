"""Available memory: the machine's, and what limits of control groups leave, in the ways that kernels tell it."""

from pathlib import Path

import pytest

from eclip.dataloading.system.memory import available_memory

GIB = 1 << 30
NONE = "9223372036854771712"  # how version 1 says that there is no limit


def machine(root: Path, gib: int, groups: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:  99 kB\nMemAvailable:   {gib << 20} kB\nHugePages_Total: 0\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root / "proc"


def group(folder: Path, version: int, limit: str, used: int, files: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    for name, value in zip(names[version][:2], (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    start = names[version][2]
    (folder / "memory.stat").write_text(f"cache 7\n{start}inactive_file {files}\n{start}active_file {files}\n")


def test_this_machine() -> None:
    left = available_memory()
    assert left is None or 0 < left < 1 << 50


@pytest.mark.parametrize(("version", "line"), [(1, "9:pids:/\n4:cpu,memory:/job/step\n0::/\n"), (2, "0::/job/step\n")])
def test_the_narrowest_group_counts(tmp_path: Path, version: int, line: str) -> None:
    proc = machine(tmp_path, 64, line)
    groups = tmp_path / "cgroup"
    root = groups / "memory" if version == 1 else groups
    assert available_memory(proc, groups) == 64 * GIB
    group(root / "job/step", version, NONE if version == 1 else "max", 3 * GIB)
    assert available_memory(proc, groups) == 64 * GIB
    group(root / "job", version, str(16 * GIB), 10 * GIB, GIB)  # pages of files can be had: 2 GiB of the 10
    assert available_memory(proc, groups) == 8 * GIB
    group(root / "job/step", version, str(4 * GIB), 3 * GIB)
    assert available_memory(proc, groups) == 1 * GIB
    group(root / "job/step", version, str(4 * GIB), 5 * GIB)
    assert available_memory(proc, groups) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_that_sees_the_hosts_path(tmp_path: Path, version: int) -> None:
    proc = machine(tmp_path, 64, "4:memory:/docker/3f\n" if version == 1 else "0::/docker/3f\n")
    root = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    group(root, version, str(8 * GIB), 2 * GIB)
    assert available_memory(proc, tmp_path / "cgroup") == 6 * GIB


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") is None
