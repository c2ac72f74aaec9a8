"""Packing the embedded catalogue: the same bytes again, nothing twice, nothing of others, nothing half done."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eclip.dataloading.demo import pack as demo
from eclip.dataloading.demo.split import SPLITS
from eclip.dataloading.packing.shard_writer import write_shards
from eclip.dataloading.schema import ImageRecord, Product
from tests.dataloading.demo.packed import SMALL, read
from tests.helpers import rank_environment

COMMAND = [sys.executable, "-m", "eclip.dataloading.demo", "--workers", "2", "--limit", "60", "--no-progress"]


def test_same_seed_same_bytes_whatever_the_workers(shards: Path, tmp_path: Path) -> None:
    demo.pack_demo(tmp_path, **{**SMALL, "workers": 2})
    for path in shards.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_seed_changes_scenes_but_not_the_split(shards: Path, tmp_path: Path) -> None:
    demo.pack_demo(tmp_path, **SMALL, seed=1)
    for name in SPLITS:
        old, new = read(shards, name), read(tmp_path, name)
        assert [p.key for p, _ in old] == [p.key for p, _ in new]
        assert old[0][1] != new[0][1]


def test_skipped_when_up_to_date_and_rebuilt_when_not(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record_split(products, folder, split):
        calls.append(split)
        (folder / f"{split}-000000.tar").write_bytes(b"new")

    monkeypatch.setattr(demo, "write_tars", record_split)
    for change in ("nothing", "settings", "longer tar", "lost tar", "broken record", "odd record", "list as record"):
        for path in shards.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        settings = {**SMALL, "image_size": 96} if change == "settings" else SMALL
        if change == "longer tar":
            with (tmp_path / "train-000000.tar").open("ab") as tar:
                tar.write(b"x")
        elif change == "lost tar":
            (tmp_path / "val-000000.tar").unlink()
        elif change == "odd record":
            record = json.loads((shards / "demo.json").read_text())
            (tmp_path / "demo.json").write_text(json.dumps({**record, "files": None}))
        elif change != "nothing" and change != "settings":
            (tmp_path / "demo.json").write_text({"broken record": "{", "list as record": "[]"}[change])
        calls.clear()
        demo.pack_demo(tmp_path, **settings)
        assert calls == ([] if change == "nothing" else list(SPLITS)), change
        assert ((tmp_path / "train-000000.tar").read_bytes() == b"new") == (change != "nothing")


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"image_size": 16}, "image_size=16"),
        ({"images_per_product": 1}, "images_per_product=1"),
        ({"distractors": (3, 2)}, "distractors=(3, 2)"),
        ({"limit": 5}, "limit=5"),
        ({"workers": 0}, "workers=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict, named: str) -> None:
    with pytest.raises(ValueError) as error:
        demo.pack_demo(tmp_path, **settings)
    assert named in str(error.value)
    assert not list(tmp_path.iterdir())


def test_command_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--image-size", "64", "--images-per-product", "6", "--limit", "24", "--workers", "1", "--no-progress"]
    demo.main(["--out", str(shards), *flags])  # up to date: returns at once
    printed = capsys.readouterr().out
    assert f"train {json.loads((shards / 'demo.json').read_text())['products']['train']}" in printed
    with pytest.raises(SystemExit):
        demo.main(["--out", str(shards), "--distractors", "4", "1"])
    assert "distractors=(4, 1)" in capsys.readouterr().err


def test_two_runs_at_once_pack_once(shards: Path, tmp_path: Path) -> None:
    """The second waits for the first's lock and finds its shards."""
    folder = tmp_path / "both"
    shutil.copytree(shards, folder)
    (folder / "demo.json").rename(tmp_path / "demo.json")  # as while another run is packing
    record = json.loads((tmp_path / "demo.json").read_text())
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    with open(folder / ".pack.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=demo.pack_demo, args=(folder,), kwargs=SMALL)
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive(), "nobody packs a folder that is being packed"
        (tmp_path / "demo.json").rename(folder / "demo.json")
    waiting.join(60)
    assert json.loads((folder / "demo.json").read_text()) == record
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == before


def test_tars_of_others_are_refused(shards: Path, tmp_path: Path) -> None:
    shutil.copy(shards / "train-000000.tar", tmp_path)
    with pytest.raises(ValueError, match=r"train-000000\.tar, which no record"):
        demo.pack_demo(tmp_path, **SMALL)
    assert (tmp_path / "train-000000.tar").read_bytes() == (shards / "train-000000.tar").read_bytes()
    (tmp_path / "train-000000.tar").unlink()
    mine = Product(key="p", product="p", title="a", category="b", images=(ImageRecord(file="000.jpg"),))
    write_shards([(mine, [b"x"])], tmp_path, "train")
    before = (tmp_path / "train-000000.tar").read_bytes()
    with pytest.raises(ValueError, match=r"train-000000\.tar, which no record .*demo\.json.* choose another folder"):
        demo.pack_demo(tmp_path, **SMALL)
    assert (tmp_path / "train-000000.tar").read_bytes() == before


def test_a_stopped_run_leaves_the_shards_of_before(shards: Path, tmp_path: Path) -> None:
    """SIGTERM while two processes compose: one line, status 143, no process and nothing half done is left."""
    folder = tmp_path / "out"
    shutil.copytree(shards, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".pack.lock"}
    command = [*COMMAND, "--out", str(folder)]
    with subprocess.Popen(
        command, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            _wait_for(lambda: list(folder.glob(".packing/*.tar")) or run.poll() is not None)
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            run.send_signal(signal.SIGTERM)
            out, err = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 143 and not out, err
    assert err.count("\n") == 1 and f"{folder}: stopped; what was there before is as it was (SIGTERM)" in err
    assert len(children) >= 2
    _wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".pack.lock"} == before


def test_composing_processes_die_with_a_killed_run(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path)]
    with subprocess.Popen(command, env=rank_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            _wait_for(lambda: list(tmp_path.glob(".packing/*.tar")) or run.poll() is not None)
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        finally:
            run.kill()
    assert len(children) >= 2
    _wait_for(lambda: not any(_composes(child) for child in children))


def _composes(process: str) -> bool:
    """Whether it is one of the pool: multiprocessing's tracker ends by itself, when its pipe does."""
    try:
        return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _wait_for(event: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < end
        time.sleep(0.02)
