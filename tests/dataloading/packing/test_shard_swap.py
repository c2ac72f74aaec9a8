"""New shards replace the old ones together: after errors and kills at every step a folder is one packing's."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from eclip.dataloading.packing import shard_swap
from eclip.dataloading.packing.shard_swap import RECORD, own, refuse_foreign, replace_shards, write_record
from eclip.dataloading.shards import find_tars
from tests.helpers import rank_environment

FOREIGN = {"notes.txt": "mine", "extra-000000.tar": "mine", "train.tar": "mine", "train-000000.tar.part": "a download"}


def pack(folder: Path, name: str, splits: tuple[str, ...] = ("train", "val", "test"), tars: int = 2) -> None:
    """A packing whose files say which one wrote them."""
    with own(folder, wait=False), replace_shards(folder) as aside:
        for split in splits:
            for number in range(tars):
                (aside / f"{split}-{number:06d}.tar").write_text(f"{name} {split} {number}")
        (aside / "rejected.jsonl").write_text(name)
        write_record(aside, RECORD, {"name": name})


def content(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file() and p.name != ".pack.lock"}


def left_over(folder: Path) -> list[str]:
    hidden = (p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".pack.lock")
    return [*hidden, *(p.name for p in folder.glob("*.part") if p.name not in FOREIGN)]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder packed before, with indexes beside its shards and files of others."""
    pack(tmp_path, "first")
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.index.npz").write_text("first")
    for name, text in FOREIGN.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_splits_are_replaced_together_and_those_it_has_not_go(packed: Path) -> None:
    pack(packed, "second", splits=("train", "val"), tars=1)
    found = content(packed)
    record = json.loads(found.pop(RECORD))
    tars = {"train-000000.tar": "second train 0", "val-000000.tar": "second val 0"}
    assert found == {**tars, "rejected.jsonl": "second", **FOREIGN}
    assert record["name"] == "second" and record["files"] == {name: len(text) for name, text in tars.items()}
    assert not left_over(packed)


def test_tars_are_somebody_elses_when_no_record_lists_them(tmp_path: Path) -> None:
    refuse_foreign(tmp_path)
    (tmp_path / "extra-000000.tar").write_text("no split of ours")
    refuse_foreign(tmp_path)
    (tmp_path / "val-3.tar").write_text("written by webdataset")
    with pytest.raises(ValueError, match=r"holds val-3\.tar, which no record of a packing .* choose another folder"):
        refuse_foreign(tmp_path)
    (tmp_path / "val-3.tar").unlink()
    pack(tmp_path, "first")
    refuse_foreign(tmp_path)
    (tmp_path / "train-000002.tar").write_text("put beside ours")
    with pytest.raises(ValueError, match=r"train-000002\.tar"):
        refuse_foreign(tmp_path)
    (tmp_path / RECORD).write_text('{"files": {"../outside-000000.tar": 1, "train-0')
    refuse_foreign(tmp_path)  # a packing's folder, its record damaged


def test_a_record_cannot_name_files_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_text("outside")
    folder = tmp_path / "out"
    pack(folder, "first")
    for files in ({"../train-000000.tar": 1}, ["train-000000.tar"], {"train-000000.tar": None}):
        (folder / RECORD).write_text(json.dumps({"files": files}))
        pack(folder, "second")
    assert (tmp_path / "train-000000.tar").read_text() == "outside"


@pytest.mark.parametrize(
    "error, expected, said",
    [
        (ValueError("no product"), ValueError, "no product"),
        (OSError(28, "No space left on device"), ValueError, r"not written \(No space .* MiB free.*is as it was"),
        (OSError(5, "Input/output error"), ValueError, "not written .*is as it was"),
        (KeyboardInterrupt(), KeyboardInterrupt, "what was there before is as it was"),
        (MemoryError(), MemoryError, None),
    ],
)
def test_an_error_while_writing_leaves_everything(packed: Path, error, expected, said) -> None:
    before = content(packed)

    def fail() -> None:
        with own(packed, wait=False), replace_shards(packed) as aside:
            (aside / "train-000000.tar").write_text("half")
            raise error

    with pytest.raises(expected, match=said):
        fail()
    assert content(packed) == before and not left_over(packed)


def test_an_error_at_any_step_of_the_swap_leaves_everything(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename, steps = content(packed), Path.rename, 0
    for failing in range(1000):
        calls = 0

        def fails(self: Path, target: Path, failing: int = failing) -> Path:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(5, "Input/output error")
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fails)
            try:
                pack(packed, "second", splits=("train",))
                break
            except ValueError as error:
                said = str(error)
        assert "is as it was" in said
        assert content(packed) == before and not left_over(packed), failing
        steps += 1
    assert steps > 12 and content(packed)["train-000000.tar"] == "second train 0"
    assert not (packed / "val-000000.tar").exists() and not left_over(packed)


KILLED = """
import os, signal, sys
from pathlib import Path
from eclip.dataloading.packing.shard_swap import RECORD, own, replace_shards, write_record
folder, step = Path(sys.argv[1]), int(sys.argv[2])
rename, calls = Path.rename, 0
def killed(self, target):
    global calls
    calls += 1
    if calls == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
with own(folder, wait=False), replace_shards(folder) as aside:
    for split in ("train", "val"):
        (aside / f"{split}-000000.tar").write_text("second")
    if step == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write_record(aside, RECORD, {"name": "second"})
"""


def test_a_kill_at_any_step_is_refused_by_readers_and_undone_by_the_next_packing(
    packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also a kill while the next packing puts things back, by what the one before it left."""
    before, refused = content(packed), 0
    for step in range(100):
        done = subprocess.run([sys.executable, "-c", KILLED, str(packed), str(step)], env=rank_environment())
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        if (packed / ".packing-unfinished").exists():
            with pytest.raises(ValueError, match="pack again"):
                find_tars(packed, "train")
            refused += 1
        else:
            assert content(packed) == before, step
            assert len(find_tars(packed, "train")) == 2
        if step % 3 == 0:
            caplog.clear()
            with own(packed, wait=False):
                assert content(packed) == before, step
            assert "killed packing" in caplog.text or "former ones are back" in caplog.text
    assert refused > 8, "most steps lie within the swap"
    now = content(packed)
    assert now["train-000000.tar"] == now["val-000000.tar"] == "second" and not left_over(packed)
    assert not {"train-000001.tar", "test-000000.tar", "train.index.npz", "rejected.jsonl"} & now.keys()


def test_a_swap_that_cannot_be_undone_says_what_to_do(packed: Path) -> None:
    (packed / ".packing-unfinished").mkdir()
    with pytest.raises(ValueError, match=r"moves\.json: unreadable .*pack again"):
        pack(packed, "second")


def test_a_signal_during_the_swap_waits_for_its_end(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = shard_swap._replaced

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return replaced(*args)

    monkeypatch.setattr(shard_swap, "_replaced", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        pack(packed, "second")
    assert not str(stop.value), "nothing is said to be as it was"
    assert content(packed)["val-000001.tar"] == "second val 1" and not left_over(packed)


@pytest.mark.parametrize("kind", ["file", "below a file", "no such place", "dangling link", "its lock"])
def test_a_folder_that_cannot_be(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    where = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "out",
        "no such place": Path("/proc/nowhere"),
        "dangling link": tmp_path / "link",
        "its lock": tmp_path / "shards",
    }
    (tmp_path / "shards" / ".pack.lock").mkdir(parents=True)
    folder = where[kind]
    with pytest.raises(ValueError, match="cannot be a folder of shards .* choose another one") as error:
        pack(folder, "first")
    assert str(folder) in str(error.value) and (tmp_path / "file").read_text() == "mine"
    assert ("it is a link to nowhere" in str(error.value)) == (kind == "dangling link")
    assert ("(Is a directory, .pack.lock)" in str(error.value)) == (kind == "its lock")


def test_a_second_packing_is_refused_or_waits(packed: Path) -> None:
    order: list[str] = []
    with own(packed, wait=False):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is packing into this folder; wait until"):
            pack(packed, "second")

        def wait() -> None:
            with own(packed, wait=True):
                order.append("second")

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(60)
    assert order == ["first", "second"]
