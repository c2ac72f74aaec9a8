"""Where an export goes: whole or not at all, and over nothing that is another's."""

import os
import shutil
from pathlib import Path

import pytest

from eclip.dataloading.system.lock import alone
from eclip.export.folder import check_place, whole
from eclip.files import PARTIAL
from tests.training.run_folders import contents


def test_places_that_are_refused(finished: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    clone = Path(shutil.copytree(exported, tmp_path / "clone"))
    (clone / ".git").mkdir()
    for out, words in (
        (finished, "a run's folder"),
        (tmp_path / "file", "a file; choose a folder"),
        (tmp_path / "mine", "holds notes.txt, which no export wrote"),
        (tmp_path / "link", "a link to .*gone, which is not there"),
        (clone, r"holds \.git, which no export wrote"),
    ):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=words):
                check_place(out, finished, overwrite=overwrite)
    with pytest.raises(ValueError, match="holds an earlier export; replace it with --overwrite"):
        check_place(exported, finished, overwrite=False)
    check_place(exported, finished, overwrite=True)
    check_place(tmp_path / "new" / "deep", finished, overwrite=False)
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty", finished, overwrite=False)


def write(out: Path, text: str) -> None:
    with whole(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)


def test_it_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    write(out, "one")
    assert contents(out) == {"inner": None, "inner/file": b"one"}
    write(out, "two")
    assert contents(out)["inner/file"] == b"two" and os.listdir(out.parent) == ["out"]


def fail(out: Path, error: BaseException) -> None:
    with whole(out) as folder:
        (folder / "file").write_text("half")
        raise error


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for error in (KeyboardInterrupt, ValueError, OSError):
        with pytest.raises(ValueError if error is OSError else error):
            fail(out, error("x"))
        assert os.listdir(tmp_path) == []
    write(out, "one")
    with pytest.raises(RuntimeError):
        fail(out, RuntimeError())
    assert contents(out)["inner/file"] == b"one" and os.listdir(tmp_path) == ["out"]


def test_a_killed_export_is_cleared_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / f"out{PARTIAL}"
    (partial / "towers").mkdir(parents=True)
    (partial / "model.safetensors").write_text("half")
    (partial / ".lock").touch()
    write(out, "one")
    assert sorted(contents(out)) == ["inner", "inner/file"]
    partial.mkdir()
    with alone(partial / ".lock"), pytest.raises(ValueError, match="another export writes it now .process"):
        write(out, "two")
    assert contents(out)["inner/file"] == b"one"


def test_neighbours_are_left_alone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "backup").touch()
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.old"] and os.listdir(tmp_path / "out.old") == ["backup"]
    theirs = tmp_path / f"other{PARTIAL}"
    theirs.mkdir()
    (theirs / "file").touch()
    with pytest.raises(ValueError, match="in the way, and no export wrote it"):
        check_place(tmp_path / "other", finished, overwrite=True)


def test_a_linked_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write(tmp_path / "out", "one")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "inner" / "file").read_text() == "one"
