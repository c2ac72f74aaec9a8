"""Who owns a run folder: one run at a time, also across processes and kills; readers never wait."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import eclip.training.checkpoint.run_folder
from eclip.presets import PRESETS
from eclip.training.checkpoint.run_folder import (
    check_usable,
    delete_run,
    is_run,
    own,
    read_config,
    read_data_record,
    refuse_busy,
)
from tests.helpers import rank_environment

HOLD = """
import os, sys
from pathlib import Path
from eclip.dataloading.system.lock import alone  # what `own` holds, without the seconds that torch takes to import
with alone(Path(sys.argv[1], ".lock")):
    if os.fork() == 0:  # a data worker, which has the lock file open too
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    """A process that owns `folder` until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=rank_environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eclip.training.checkpoint.run_folder, "_LOCK_PATIENCE", 0.2)
    holder = _holder(tmp_path)
    try:
        content = (tmp_path / ".lock").read_text()
        for attempt in (lambda: refuse_busy(tmp_path), lambda: own(tmp_path).__enter__()):
            with pytest.raises(
                ValueError, match=rf"a run writes there now \(process {holder.pid} on .*another --run-dir"
            ):
                attempt()
        assert (tmp_path / ".lock").read_text() == content
    finally:
        holder.communicate(timeout=60)
    with own(tmp_path):
        pass


def test_a_killed_run_lets_go_within_the_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data worker holds the lock until it is gone too."""
    monkeypatch.setattr(eclip.training.checkpoint.run_folder, "_LOCK_PATIENCE", 60.0)
    holder = _holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=60)
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.close()  # the worker ends
    refuse_busy(tmp_path)
    with own(tmp_path):
        pass
    holder.stdout.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_serves_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """Lustre mounted without flock, some NFS."""
    (tmp_path / ".lock").write_text("an earlier run")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    refuse_busy(tmp_path)
    with own(tmp_path):
        pass
    (record,) = caplog.records
    assert "no locks on this file system" in record.message


def test_what_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with own(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    with own(folder):
        (folder / "config.json").write_text("{}")
    assert {p.name for p in folder.iterdir()} == {".lock", "config.json"}
    with own(folder):  # made before: stays
        (folder / "config.json").unlink()
    assert folder.is_dir()


def test_what_counts_as_a_run(tmp_path: Path) -> None:
    check_usable(tmp_path / "absent")
    check_usable(tmp_path)
    assert not is_run(tmp_path)
    (tmp_path / "config.json").write_text(PRESETS["demo"].to_json())
    (tmp_path / "tokenizer").mkdir()
    check_usable(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="holds config.json, which no run of this program wrote"):
        check_usable(tmp_path)
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)  # damaged settings, but a run
    check_usable(tmp_path)
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(ValueError, match="tensorboard: a file where a run has a folder"):
        check_usable(tmp_path)


def test_linked_checkpoints_are_unlinked_not_emptied(tmp_path: Path) -> None:
    scratch, run_dir = tmp_path / "scratch", tmp_path / "run"
    (scratch / "step_00000003").mkdir(parents=True)
    (scratch / "step_00000003" / "state.json").write_text("{}")
    (scratch / "other.txt").write_text("mine")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "state.json").write_text("{}")
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(scratch)
    (scratch / "step_00000004").symlink_to(tmp_path / "kept")
    delete_run(run_dir)
    assert sorted(p.name for p in scratch.iterdir()) == ["other.txt"]
    assert (tmp_path / "kept" / "state.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"data_dir": "/a"}', '{"fingerprints": []}'])
def test_a_damaged_data_record_is_named(tmp_path: Path, text: str) -> None:
    assert read_data_record(tmp_path) is None
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/data\.json: .*restore it"):
        read_data_record(tmp_path)
    os.remove(tmp_path / "data.json")


def test_a_link_to_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Of a disk that is not mounted, say: nothing is made in its place."""
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match="run: a link to .*disk, which is not there; .*another --run-dir"):
        check_usable(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    check_usable(tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "data.json", "tokenizer/tokenizer.json", "metrics.jsonl", ".lock"])
def test_a_folder_or_a_device_where_a_run_has_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    path = tmp_path / name
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name}: no regular file, .*another --run-dir"):
        check_usable(tmp_path)
    path.rmdir()
    path.symlink_to("/dev/zero")  # whoever reads that never ends
    with pytest.raises(ValueError, match="no regular file"):
        check_usable(tmp_path)


def test_a_byte_order_mark_of_an_editor_is_no_damage(tmp_path: Path) -> None:
    config = PRESETS["debug"]
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8-sig")
    (tmp_path / "data.json").write_text('{"fingerprints": {}}', encoding="utf-8-sig")
    assert is_run(tmp_path)
    assert read_config(tmp_path) == config
    assert read_data_record(tmp_path) == {"fingerprints": {}}
