"""What torchrun tells a rank and wants from it."""

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from eclip import torchrun
from eclip.signals import LAUNCHER_GONE
from eclip.torchrun import begun_by_this_launch, mark_begun, restart_is_left, stopped_status, write_error_file


def _launch(monkeypatch: pytest.MonkeyPatch, run_id: str = "none", *, restarts: int = 0, count: int = 0) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


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
