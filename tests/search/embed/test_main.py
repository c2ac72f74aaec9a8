"""The command: flags, one line for whatever goes wrong, exit statuses."""

import os
import signal
from pathlib import Path

import pytest

from eclip.search.embed import Report
from eclip.search.embed.__main__ import main
from eclip.search.embed.parts import Parts
from eclip.search.embed.store import WORK
from tests.helpers import file_size_limit


def fails(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """The one line of a command that ends with 1."""
    assert main([str(flag) for flag in flags]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--out", "x"), "give --data SHARDS, or --table TABLE and --images FOLDER: one of the two"),
        (("--out", "x", "--table", "t.csv"), "--table and --images go together"),
        (("--out", "x", "--data", "d", "--column", "title=name"), "belong to --table"),
        (("--out", "x", "--table", "t", "--images", "i", "--split", "test"), "--split: a table has no splits"),
        (("--out", "", "--data", "d"), "--out: its value is empty"),
        (("--data", "d"), "--out"),
        (("--out", "x", "--data", "d", "--dim", "many"), "--dim"),
    ],
)
def test_flags_that_cannot_be(flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--model", "m", *flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and words in said[0], said


def test_what_is_missing_is_told(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "index")
    assert "no such folder" in fails(capsys, "--model", tmp_path / "none", "--data", tmp_path, *out)
    assert "no such folder" in fails(capsys, "--model", run_dir, "--data", tmp_path / "none", *out)
    assert "no train-000000.tar" in fails(capsys, "--model", run_dir, "--data", tmp_path, *out)
    table = ("--table", tmp_path / "none.csv", "--images", tmp_path)
    assert "none.csv: no such table" in fails(capsys, "--model", run_dir, *table, *out)
    assert not (tmp_path / "index").exists()


def test_a_full_disk_is_one_line_and_goes_on(
    made: tuple[Path, Report], run_dir: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", run_dir, "--data", shards, "--out", tmp_path / "index", "--quiet")
    with file_size_limit(20_000):
        said = fails(capsys, *flags)
    assert "cannot be written" in said and "start the same command again, which goes on" in said
    assert main([str(flag) for flag in flags]) == 0
    said = capsys.readouterr().out
    assert "131 images of 4 products" in said and "images/s" in said and "test/k001/003.jpg" in said
    assert main([str(flag) for flag in flags]) == 0
    assert "complete, nothing to do (131 images" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made(
    run_dir: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    said = fails(capsys, "--model", run_dir, "--data", shards, "--out", tmp_path / "file" / "index")
    assert "cannot be written (Not a directory)" in said


def test_a_stop_is_one_line(
    run_dir: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parts, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    flags = ("--model", run_dir, "--data", shards, "--out", tmp_path / "index", "--quiet")
    assert main([str(flag) for flag in flags]) == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert (said.out + said.err).strip() == "SIGTERM: stopped; the same command goes on with what is done"
    assert os.listdir(tmp_path / "index") == [WORK]
