"""What torchrun tells a rank and wants from it."""

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from eclip.parallel import torchrun
from eclip.parallel.signals import LAUNCHER_GONE
from eclip.parallel.torchrun import (
    Place,
    begun_by_this_launch,
    find_place,
    is_local,
    mark_begun,
    restart_is_left,
    stopped_status,
    write_error_file,
)


def _launch(monkeypatch: pytest.MonkeyPatch, run_id: str = "none", *, restarts: int = 0, count: int = 0) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


def _set_place(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in ({}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"RANK": "", "WORLD_SIZE": ""}):
        _set_place(monkeypatch, **alone)
        assert find_place() == Place()
    _set_place(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    assert find_place() == Place(rank=5, world_size=8, local_rank=1, local_size=4)
    assert [is_local(rank) for rank in range(3, 9)] == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment without RANK; start ranks by torchrun"),
        ({"RANK": "1"}, "RANK=1 in the environment without WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 with WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "node1", "WORLD_SIZE": "2"}, "RANK='node1'"),
        ({"RANK": "0", "WORLD_SIZE": "2(x3)"}, r"WORLD_SIZE='2\(x3\)'"),  # as Slurm lists tasks per node
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK='one'"),
    ],
)
def test_an_environment_set_in_part(values: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_place(monkeypatch, **values)
    with pytest.raises(ValueError, match=words) as error:
        find_place()
    assert "\n" not in str(error.value)


def test_exit_status_of_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stopped_status(signal.SIGTERM) == 143
    assert stopped_status(signal.SIGINT) == 130
    assert stopped_status(signal.SIGUSR1) == 138
    _launch(monkeypatch)
    assert stopped_status(signal.SIGTERM) == 143
    assert not restart_is_left()
    _launch(monkeypatch, restarts=2, count=2)  # other agents may count otherwise
    assert stopped_status(signal.SIGTERM) == 0
    assert stopped_status(LAUNCHER_GONE) != 0
    assert not restart_is_left()
    _launch(monkeypatch, restarts=2, count=1)
    assert restart_is_left()


def test_the_summary_of_torchrun_ends_with_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by torch's own code: messages, and the earliest time as the root cause."""
    failures = {}
    for rank, (line, when) in enumerate([("left because rank 1 failed", 2000.0), ("error: full disk", 1000.0)]):
        path = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        write_error_file(line, when=when)
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=str(path))
    summary = str(ChildFailedError("eclip.train", failures))
    assert summary.splitlines()[-2].strip() == "traceback : error: full disk"


def test_a_traceback_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    write_error_file("KeyError: 'a'", traceback="Traceback ...\nKeyError: 'a'")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert "Traceback ..." in str(ChildFailedError("eclip.train", {0: failure}))


def test_which_launch_began_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    mark_begun(run_dir)
    assert not run_dir.exists()
    assert not begun_by_this_launch(run_dir)  # without torchrun nothing restarts

    _launch(monkeypatch)
    assert not begun_by_this_launch(run_dir)
    mark_begun(run_dir)
    assert begun_by_this_launch(run_dir)  # also when the number of nodes changed, which counts as no restart
    _launch(monkeypatch, "another")
    assert not begun_by_this_launch(run_dir)

    # A later torchrun with the same run id is another launch; one that restarted its ranks on other nodes is not.
    monkeypatch.setattr(torchrun.os, "getppid", lambda: 1)
    _launch(monkeypatch)
    assert not begun_by_this_launch(run_dir)
    _launch(monkeypatch, restarts=1, count=1)
    assert begun_by_this_launch(run_dir)

    for damaged in ("", "{", "[]", "null"):
        (run_dir / "launch.json").write_text(damaged)
        assert not begun_by_this_launch(run_dir)
