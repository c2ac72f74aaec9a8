"""An array that several processes fill: killed, continued, shared, damaged, and on disks without room."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from eclip.dataloading.errors import DataError
from eclip.training.feature_cache.disk import damage, read_notes
from eclip.training.feature_cache.file import CannotStore
from tests.helpers import rank_environment
from tests.training.feature_cache.filling import BATCH, EXPECTED, ITEMS, WIDTH, Recorder, filling

# What a process of its own runs: FOLDER, then what happens when the item WHERE is asked for: it dies there, or it says
# so on stdout and waits for a line on stdin.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.training.feature_cache.filling import Recorder, filling
folder, what, where = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
class Interrupted(Recorder):
    def __call__(self, first, last):
        if first <= where < last:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "wait":
                print("here", flush=True)
                sys.stdin.readline()
        return super().__call__(first, last)
compute = Interrupted()
filling(folder, compute).open()
print(*compute.computed)
"""


def run(folder: Path, what: str, where: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), what, str(where)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=rank_environment(), text=True, **pipes)  # type: ignore[call-overload]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"x.lock"}


def test_filled_once_then_read(tmp_path: Path) -> None:
    compute = Recorder()
    one = filling(tmp_path / "new" / "folder", compute)
    assert np.array_equal(one.open(), EXPECTED)
    assert compute.computed == list(range(ITEMS))
    assert np.array_equal(one.open(), EXPECTED) and len(compute.computed) == ITEMS
    assert one.notes() == {7: "line\u2028 one\ntwo"}
    assert left(tmp_path / "new" / "folder") == {"x.npy", "x.notes.jsonl"}
    assert np.array_equal(np.load(one.path), EXPECTED)


@pytest.mark.parametrize("where", [0, 9, ITEMS - 1])
def test_a_killed_build_continues_where_it_stood(tmp_path: Path, where: int) -> None:
    process = run(tmp_path, "kill", where)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "x.npy").exists()
    compute = Recorder()
    again = filling(tmp_path, compute)
    assert np.array_equal(again.open(), EXPECTED)
    assert compute.computed == list(range(where // BATCH * BATCH, ITEMS))
    unbroken = filling(tmp_path / "unbroken", Recorder())
    unbroken.open()
    assert again.path.read_bytes() == unbroken.path.read_bytes()
    assert again.notes() == unbroken.notes() == {7: "line\u2028 one\ntwo"}
    assert left(tmp_path) == {"x.npy", "x.notes.jsonl", "unbroken"}


@pytest.mark.parametrize("end", ["goes on", "is killed"])
def test_processes_share_the_work_and_wait_for_what_another_one_has(tmp_path: Path, end: str) -> None:
    """One stands at item 0: the other does all the rest, waits for it, and does its part when it dies."""
    process = run(tmp_path, "wait", 0)
    try:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        mine, all_but_one = Recorder(), threading.Event()

        def compute(first: int, last: int) -> tuple[np.ndarray, dict[int, str]]:
            answer = mine(first, last)
            if last == ITEMS:
                all_but_one.set()
            return answer

        found: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: found.append(filling(tmp_path, compute).open()), daemon=True)
        thread.start()
        assert all_but_one.wait(60)
        thread.join(0.2)
        assert thread.is_alive() and mine.computed == list(range(BATCH, ITEMS))
        assert not (tmp_path / "x.npy").exists()
        if end == "goes on":
            said, _ = process.communicate("\n", timeout=60)
            assert said.split() == [str(i) for i in range(BATCH)]
        else:
            process.kill()
        thread.join(60)
        assert np.array_equal(found[0], EXPECTED)
        assert mine.computed[ITEMS - BATCH :] == ([] if end == "goes on" else list(range(BATCH)))
    finally:
        process.kill()
        process.communicate()


def test_three_processes_at_once_compute_every_item_once(tmp_path: Path) -> None:
    processes = [run(tmp_path, "nothing") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sorted(int(i) for out, _ in outputs for i in out.split()) == list(range(ITEMS))
    assert np.array_equal(np.load(tmp_path / "x.npy"), EXPECTED)
    assert left(tmp_path) == {"x.npy", "x.notes.jsonl"}


def _interrupted(folder: Path, **changes: object) -> None:
    """An array with its first five batches."""

    def compute(first: int, last: int) -> tuple[np.ndarray, dict[int, str]]:
        if first == 5 * BATCH:
            raise KeyboardInterrupt
        return Recorder()(first, last)

    with pytest.raises(KeyboardInterrupt):
        filling(folder, compute, **changes).open()
    assert left(folder) == {"x.partial", "x.progress", "x.notes.partial"}


def test_ctrl_c_is_continued_and_shown_from_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _interrupted(tmp_path)
    compute = Recorder()
    assert np.array_equal(filling(tmp_path, compute, progress=True, label="filling").open(), EXPECTED)
    assert compute.computed == list(range(20, ITEMS))
    shown = capsys.readouterr().err
    assert "filling:  40%" in shown and "20/50" in shown and "50/50" in shown


@pytest.mark.parametrize(
    "what",
    ["other settings", "other shape", "garbage", "short record", "empty record", "no data", "short data"],
)
def test_a_record_that_does_not_fit_is_not_continued(tmp_path: Path, what: str) -> None:
    _interrupted(tmp_path, **({"settings": "bfloat16"} if what == "other settings" else {}))
    record, data = tmp_path / "x.progress", tmp_path / "x.partial"
    match what:
        case "other shape":
            record.write_bytes(record.read_bytes().replace(b"[50, 3]", b"[50, 6]"))
        case "garbage":
            record.write_bytes(os.urandom(len(record.read_bytes())))
        case "short record":
            record.write_bytes(record.read_bytes()[:-1])
        case "empty record":
            record.write_bytes(b"")
        case "no data":
            data.unlink()
        case "short data":
            os.truncate(data, data.stat().st_size - 1)
    compute = Recorder()
    assert np.array_equal(filling(tmp_path, compute).open(), EXPECTED)
    assert compute.computed == list(range(ITEMS))
    assert left(tmp_path) == {"x.npy", "x.notes.jsonl"}


@pytest.mark.parametrize("what", ["empty", "header alone", "short", "longer", "no array", "other type", "hole"])
def test_a_damaged_file_is_named_and_filled_again(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a killed copy leaves: reading a map of it would be SIGBUS, or zeros."""
    one = filling(tmp_path, Recorder())
    one.open()
    whole = one.path.read_bytes()
    bad = {
        "empty": b"",
        "header alone": whole[:128],
        "short": whole[:-1],
        "longer": whole + b"\0",
        "no array": b"<html>not found</html>" * 30,
        "hole": whole[:-40] + bytes(40),
    }
    if what == "other type":
        np.save(one.path, EXPECTED.astype(np.float32))
    else:
        one.path.write_bytes(bad[what])
    assert damage(one.path, (ITEMS, WIDTH))
    compute = Recorder()
    assert np.array_equal(filling(tmp_path, compute).open(), EXPECTED)
    assert compute.computed == list(range(ITEMS)) and one.path.read_bytes() == whole
    assert f"{one.path}: not a whole feature file" in caplog.text


def _failing(number: int) -> object:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_one_line_before_the_work(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _failing(number))
    compute = Recorder()
    with pytest.raises(CannotStore) as refusal:
        filling(tmp_path, compute, shape=(50_000_000, 30), hint="go elsewhere").open()
    line = str(refusal.value)
    assert line.startswith(f"{tmp_path / 'x.npy'}: {os.strerror(number)}: it needs 3.0 GB and ") and "\n" not in line
    assert "are free there; free some, or go elsewhere" in line and compute.computed == []
    assert left(tmp_path) == set()


def test_a_real_limit_is_one_line(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.training.feature_cache.filling import Recorder, filling\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try: filling(Path(sys.argv[1]), Recorder(), shape=(1_000_000, 3)).open()\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=rank_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "x.npy: File too large: it needs 6.0 MB" in done.stdout, done
    assert left(tmp_path) == set()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 65536


def test_disks_that_cannot_allocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _failing(errno.EOPNOTSUPP))
    assert np.array_equal(filling(tmp_path / "roomy", Recorder()).open(), EXPECTED)
    with pytest.raises(CannotStore, match="No space left on device: it needs"):
        filling(tmp_path / "full", Recorder(), shape=(1 << 50, 3)).open()
    assert left(tmp_path / "full") == set()


def test_a_disk_that_fills_up_in_the_middle_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks that compress or copy on write reserve nothing; quotas change."""
    write, calls = os.pwrite, []

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(CannotStore, match=r"x.npy: No space left.*stays in x.partial and the next start continues"):
            filling(tmp_path, Recorder()).open()
    compute = Recorder()
    assert np.array_equal(filling(tmp_path, compute).open(), EXPECTED)
    assert 0 < len(compute.computed) < ITEMS


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotStore, match=r"x.npy: cannot be used \(Not a directory\); use another folder"):
        filling(tmp_path / "file" / "below", Recorder()).open()
    for number in (errno.EROFS, errno.EACCES, errno.ENOENT):  # ENOENT: as below /proc
        monkeypatch.setattr(Path, "mkdir", _failing(number))
        with pytest.raises(CannotStore, match=rf"x.npy: cannot be used \({os.strerror(number)}\)"):
            filling(tmp_path / "readonly", Recorder()).open()


def test_what_compute_refuses_is_not_kept(tmp_path: Path) -> None:
    def compute(first: int, last: int) -> tuple[np.ndarray, dict[int, str]]:
        if first == 5 * BATCH:
            raise ValueError("image 20 is bad")
        return Recorder()(first, last)

    with pytest.raises(ValueError, match="image 20 is bad"):
        filling(tmp_path, compute).open()
    assert left(tmp_path) == set()


def test_what_was_computed_before_the_data_failed_is_kept(tmp_path: Path) -> None:
    """A store that does not answer, a tar that is put back: the next start goes on."""

    def compute(first: int, last: int) -> tuple[np.ndarray, dict[int, str]]:
        if first == 5 * BATCH:
            raise DataError("train-000000.tar: cannot be read")
        return Recorder()(first, last)

    with pytest.raises(DataError):
        filling(tmp_path, compute).open()
    again = Recorder()
    assert np.array_equal(filling(tmp_path, again).open(), EXPECTED)
    assert again.computed == list(range(5 * BATCH, ITEMS))


def test_large_arrays_come_in_parts_of_bounded_bytes() -> None:
    large = filling(Path("nowhere"), Recorder(), shape=(1_000_000, 145, 384), batch=32)
    part = large._items_per_part
    assert part % 32 == 0 and part * 145 * 384 * 2 <= 64 << 20


def test_a_note_that_a_kill_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    _interrupted(tmp_path)
    notes = tmp_path / "x.notes.partial"
    notes.write_bytes(notes.read_bytes() + b'\n{"item": 30, "no')
    one = filling(
        tmp_path, lambda first, last: (EXPECTED[first:last], {i: "again" for i in range(first, last) if i == 30})
    )
    one.open()
    assert one.notes() == {7: "line\u2028 one\ntwo", 30: "again"}
    assert read_notes(tmp_path / "nothing") == {}
