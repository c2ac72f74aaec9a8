"""Files that are whole or absent, on a disk that fails in the middle too."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from eclip.files import CannotWrite, append_line, replace_text, sha256


def test_replaces_and_appends_utf8(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    replace_text(path, "沙发\n")
    replace_text(path, "sofa €\n")
    append_line(path, "ligne 2")
    assert path.read_text(encoding="utf-8") == "sofa €\nligne 2\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    path = tmp_path / "a.json"
    replace_text(path, "old")

    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    words = rf"{path}: cannot be written \({os.strerror(number)}; \d+\.\d MiB are free there\); .*--run-dir"
    with pytest.raises(CannotWrite, match=words):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "a.jsonl", os.write
    append_line(path, "one")
    calls = []

    def half(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(CannotWrite, match="No space left"):
        append_line(path, "two")
    monkeypatch.undo()
    assert calls == [4, 2]
    assert path.read_text() == "one\n"


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path):
        with pytest.raises(CannotWrite, match="cannot be written"):
            replace_text(path, "x")
        with pytest.raises(CannotWrite, match="cannot be written"):
            append_line(path, "x")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_digest(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
