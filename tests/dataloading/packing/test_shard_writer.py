"""The format of the shards: names, members, equal bytes, and what is refused or fails while they are written."""

import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from eclip.dataloading.packing.shard_writer import image_name, write_shards
from eclip.dataloading.schema import ImageRecord, Product
from tests.helpers import rank_environment


def product(key: str, files: tuple[str, ...] = (image_name(0), image_name(1))) -> tuple[Product, list[bytes]]:
    records = tuple(ImageRecord(file=file) for file in files)
    facts = Product(key=key, product=key, title="A chair", category="Chairs", catalog="c", images=records)
    return facts, [f"{key}{i}".encode() * 100 for i in range(len(files))]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def names(folder: Path) -> list[str]:
    """All but the lock and the record, which every packing leaves."""
    return sorted(p.name for p in folder.iterdir() if p.name not in (".pack.lock", "packing.json"))


def test_write_shards(tmp_path: Path) -> None:
    (tmp_path / "train-000007.tar").write_bytes(b"old")
    (tmp_path / "train.index.npz").write_bytes(b"old")
    (tmp_path / "val-000000.tar").write_bytes(b"another split")
    tars = write_shards((product(f"p{i}") for i in range(5)), tmp_path, "train", max_bytes=4096)
    assert [t.name for t in tars] == [f"train-{n:06d}.tar" for n in range(len(tars))] and len(tars) > 1
    assert names(tmp_path) == sorted([*(t.name for t in tars), "val-000000.tar"])
    found = [name for tar in tars for name in members(tar)]
    assert found == [f"p{i}.{suffix}" for i in range(5) for suffix in ("json", "000.jpg", "001.jpg")]
    first = members(tars[0])
    assert Product.from_json(first["p0.json"], where="p0") == product("p0")[0]
    assert first["p0.001.jpg"] == b"p01" * 100


def test_the_record_lists_the_tars_of_every_split(tmp_path: Path) -> None:
    for split in ("train", "val", "train"):
        tars = write_shards([product("p"), product("q")], tmp_path, split, max_bytes=1)
        assert len(tars) == 2
    files = json.loads((tmp_path / "packing.json").read_text())["files"]
    assert files == {name: (tmp_path / name).stat().st_size for name in names(tmp_path)} and len(files) == 4


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = (write_shards([product("p")], tmp_path / name, "train")[0].read_bytes() for name in "ab")
    assert one == two


@pytest.mark.parametrize(
    "samples, message",
    [
        ([product("a.b")], "key 'a.b'"),
        ([product("k" * 81)], "1 to 80"),
        ([product("p"), product("p")], "occurs twice"),
        ([(product("p")[0], [b"x"])], "1 images for 2 records"),
        ([product("p", files=())], "at least one"),
        ([product("p", files=("x.jpg",))], "'x.jpg'"),
        ([], "no product"),
    ],
)
def test_bad_samples_leave_the_old_shards_alone(tmp_path: Path, samples: list, message: str) -> None:
    write_shards([product("old")], tmp_path, "train")
    record = (tmp_path / "packing.json").read_bytes()
    with pytest.raises(ValueError) as error:
        write_shards(samples, tmp_path, "train")
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert names(tmp_path) == ["train-000000.tar"]
    assert "old.json" in members(tmp_path / "train-000000.tar")
    assert (tmp_path / "packing.json").read_bytes() == record


SMALL_DISK = """
import resource, sys
from pathlib import Path
from eclip.dataloading.packing.shard_writer import write_shards
from tests.dataloading.packing.test_shard_writer import product
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_shards((product(f"p{i}") for i in range(5)), Path(sys.argv[1]), "train")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 200, 5000, 15_000])
def test_a_full_disk_leaves_the_old_shards_and_no_part(tmp_path: Path, limit: int) -> None:
    """Files may not outgrow `limit` bytes: the lock's name, the tar's first buffer, its middle, its end (10 kB)."""
    write_shards([product("old")], tmp_path, "train")
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path), str(limit)]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True)
    assert not done.stderr and done.stdout.count("\n") == 1 and "File too large" in done.stdout, done
    assert names(tmp_path) == ["train-000000.tar"] and "old.json" in members(tmp_path / "train-000000.tar")


@pytest.mark.parametrize("step", ["write", "close", "record"])
def test_no_space_at_any_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    write_shards([product("old")], tmp_path, "train")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "record":
            patch.setattr("eclip.dataloading.packing.shard_swap.json.dumps", full)
        elif step == "close":
            patch.setattr(os, "fsync", full)
            patch.setattr(tarfile.TarFile, "close", full)
        else:
            patch.setattr(tarfile.TarFile, "addfile", full)
            patch.setattr(tarfile.TarFile, "close", full)
        with pytest.raises(ValueError, match=r"No space left on device; \d+ MiB free.*is as it was"):
            write_shards([product("p")], tmp_path, "train")
    assert names(tmp_path) == ["train-000000.tar"] and "old.json" in members(tmp_path / "train-000000.tar")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
