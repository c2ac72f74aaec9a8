"""What stops a packing: wrong places and flags, signals, another packing, a full disk; what was there before stays."""

import fcntl
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eclip.dataloading import pack
from eclip.dataloading.demo import pack as demo
from eclip.dataloading.pack import pack_catalog
from eclip.dataloading.shards import ShardIndex
from tests.dataloading.shop import content, listed, shop, simple, split_keys
from tests.helpers import rank_environment


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        pack.main([*argv, "--no-progress"])
    assert stop.value.code in (1, 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_places_that_cannot_be_used_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = simple(tmp_path)
    (tmp_path / "file").write_text("mine")
    given = {"--table": str(table), "--images": str(tmp_path), "--out": str(tmp_path / "out")}
    cases = [
        ("--out", tmp_path / "file"),
        ("--out", tmp_path / "file" / "out"),
        ("--out", Path("/proc/nowhere/out")),
        ("--images", tmp_path / "none"),
        ("--images", table),
        ("--table", tmp_path / "none.csv"),
        ("--table", tmp_path),
        ("--val", "2"),
        ("--val", "much"),
        ("--column", "title"),
        ("--encoding", "klingon"),
        ("--separator", "ab"),
        ("--test", "nan"),
        ("--val", "-0.1"),
        ("--quality", "0"),
        ("--quality", "96"),
        ("--short-side", "31"),
        ("--workers", "0"),
        ("--workers", "100000"),
    ]
    for flag, value in cases:
        line = refused([str(part) for pair in {**given, flag: value}.items() for part in pair], capsys)
        assert str(value) in line, (flag, value, line)
    assert "val=2.0" in refused([*map(str, sum(given.items(), ())), "--val", "2"], capsys)
    assert "required: --out; --help" in refused(["--table", "t.csv", "--images", "."], capsys)
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.glob("out/*.tar"))


def test_tars_of_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = simple(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val-000000.tar").write_text("mine")
    argv = ["--table", str(table), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "holds val-000000.tar, which no record of a packing" in refused(argv, capsys)
    assert (tmp_path / "out" / "val-000000.tar").read_text() == "mine"


@contextmanager
def packing(table: Path, out: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "eclip.dataloading.pack", "--table", str(table), "--images", str(table.parent)]
    with subprocess.Popen(
        [*command, "--out", str(out), "--no-progress", *flags],
        env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        try:
            yield run
        finally:
            run.kill()


def at_work(run: subprocess.Popen[str], out: Path) -> None:
    """Wait until a packing writes its train split."""
    end = time.monotonic() + 120
    while not list(out.glob(".packing/train-*.tar")):
        assert run.poll() is None and time.monotonic() < end, run.communicate()
        time.sleep(0.01)


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A table whose packing takes some ten seconds: time enough to be stopped in."""
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg")
    return simple(tmp_path, 200, image="large.jpg")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_packing_leaves_the_shards_of_before(slow: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    pack_catalog(simple(tmp_path, name="quick.jsonl"), tmp_path, out, val=0.3, progress=False)
    before = content(out)
    with packing(slow, out, "--val", "0.1", "--test", "0.1") as run:
        at_work(run, out)
        run.send_signal(number)
        _, err = run.communicate(timeout=120)
    assert run.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    if number != signal.SIGKILL:
        assert err.count("\n") == 1 and "what was there before is as it was" in err, err
        assert content(out) == before
    else:
        assert {name: data for name, data in content_of_files(out).items()} == before
        assert ShardIndex.open(out, "val").num_products == len(split_keys(out)["val"])
        with packing(tmp_path / "quick.jsonl", out) as run:
            _, err = run.communicate(timeout=120)
        assert run.returncode == 0 and "removing what a killed packing left there" in err
        assert split_keys(out).keys() == {"train"} and not (out / ".packing").exists()


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".pack.lock"}


def test_a_second_packing_is_refused_at_once_and_the_first_finishes(slow: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick = simple(tmp_path, name="quick.jsonl")
    slow.write_text("".join(slow.read_text().splitlines(keepends=True)[:20]))
    with packing(slow, out, "--workers", "1") as first:
        at_work(first, out)
        with packing(quick, out) as second:
            _, err = second.communicate(timeout=120)
        assert second.returncode == 1 and err.count("\n") == 1
        assert f"process {first.pid} on " in err and "is packing into this folder" in err and str(out) in err
        _, err = first.communicate(timeout=120)
    assert first.returncode == 0 and not err
    assert ShardIndex.open(out, "train").num_products == 20


def test_a_catalogue_and_the_demo_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, out = simple(tmp_path), tmp_path / "out"
    small = {"image_size": 64, "images_per_product": 2, "limit": 20, "workers": 1, "progress": False}

    def meanwhile(*args, **options):
        with pytest.raises(ValueError, match="is packing into this folder"):
            pack_catalog(table, tmp_path, out, progress=False)
        return write_tars(*args, **options)

    write_tars = demo.write_tars
    monkeypatch.setattr(demo, "write_tars", meanwhile)
    demo.pack_demo(out, **small)
    assert (out / "demo.json").exists()
    pack_catalog(table, tmp_path, out, progress=False)
    assert sorted(content(out)) == ["packing.json", "train-000000.tar"], "nothing of the demo is left"
    with (out / ".pack.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is packing into this folder"):
            pack_catalog(table, tmp_path, out, progress=False)


@pytest.mark.parametrize("point", ["image data", "rejected.jsonl", "record"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    table, images = shop(tmp_path, products=4)
    out = tmp_path / "out"
    pack_catalog(table, images, out, progress=False)
    before = content(out)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    where, name = {
        "image data": (tarfile.TarFile, "addfile"),
        "rejected.jsonl": (pack, "_list"),
        "record": (pack, "write_record"),
    }[point]
    monkeypatch.setattr(where, name, full)
    with pytest.raises(ValueError, match=r"No space left on device; \d+ MiB free.* is as it was") as error:
        pack_catalog(table, images, out, val=0.3, progress=False)
    found = content(out)
    if point == "rejected.jsonl":
        assert "rejected.refused.jsonl could not be written: No space left" in str(error.value)
    else:
        assert len(listed(out / "rejected.refused.jsonl")) >= 3
    assert {name: data for name, data in found.items() if name != "rejected.refused.jsonl"} == before
