"""The shard index: contents, staleness, and one clear line for every way a packed split can be broken."""

import errno
import gzip
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from eclip.dataloading.schema import SOURCES
from eclip.dataloading.shards import ShardIndex, stable_hash
from tests.dataloading.fixtures import jpeg, make_split, record, write_tar


def sample(p=0, count=2, **changes):
    content = {**record(p, count), **changes}
    return f"k{p:03d}", json.dumps(content).encode(), {f"{i:03d}.jpg": jpeg(i) for i in range(count)}


def record_bytes():
    return json.dumps(record(0, 0)).encode()


def boxed(box):
    return sample(1, 1, images=[{"file": "000.jpg", "instances": [{"product": "p", "sku": "s", "box": box}]}])


def test_index_holds_what_was_written(tmp_path):
    index = ShardIndex.open(make_split(tmp_path), "train")
    assert (index.num_products, index.num_images) == (7, 42)
    assert index.image_start.tolist() == list(range(0, 43, 6)) and index.image_start.dtype == np.int64
    assert index.categories == ["cat0", "cat1", "cat2"] and index.category_ids.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert index.product_ids.tolist() == [stable_hash(f"p{p}") for p in range(7)]
    assert index.catalog_ids.tolist() == [stable_hash(f"c{p // 2}") for p in range(7)]
    for row in range(42):
        p, i = divmod(row, 6)
        assert index.product_of(row) == p
        assert index.image_key(row) == f"k{p:03d}/{i:03d}.jpg"
        assert index.title(row) == f"Title {p} of kind {i % 2}"
        assert index.title_ids[row] == stable_hash(index.title(row))
        assert SOURCES[index.image_source[row]] == SOURCES[i % 3]
        assert index.image_sku[row] == stable_hash(f"p{p}-s{i // 3}")
        assert index.read_image(row) == jpeg(100 * p + i)
    product = index.product(5)
    assert product.key == "k005" and len(product.images) == 6 and product.images[2].file == index.image_file(32)
    assert set(index.texts()) >= {"Title 0 of kind 1", "cat2"} and len(set(index.texts())) == len(index.texts())


def test_hash_is_fixed_forever():
    assert stable_hash("") == 6510301506637419378 and stable_hash("sofa") == 8531204826718693832


def test_facts_left_out_get_defaults(tmp_path):
    bare = {"title": "Red sofa", "product": "p", "category": "sofa"}
    write_tar(
        tmp_path / "train-000000.tar", [("folder/k", json.dumps(bare).encode(), {"001.jpg": b"b", "000.png": b"a"})]
    )
    index = ShardIndex.open(tmp_path, "train")
    assert [index.image_key(r) for r in range(2)] == ["folder/k/001.jpg", "folder/k/000.png"]
    assert index.title(1) == "Red sofa" and index.image_source.tolist() == [0, 0]
    assert index.catalog_ids[0] == stable_hash("p") and len(set(index.image_sku)) == 1


def test_saved_index_equals_the_scan_and_is_used(tmp_path):
    scanned = ShardIndex.open(make_split(tmp_path), "train")
    path = tmp_path / "train.index.npz"
    written = path.stat().st_mtime_ns
    read = ShardIndex.open(tmp_path, "train")
    assert path.stat().st_mtime_ns == written
    assert read.fingerprint == scanned.fingerprint
    assert np.array_equal(read.title_ids, scanned.title_ids) and read.read_image(41) == scanned.read_image(41)


def test_changed_tar_rebuilds_and_changes_the_fingerprint(tmp_path):
    before = ShardIndex.open(make_split(tmp_path), "train")
    make_split(tmp_path, products=5)
    after = ShardIndex.open(tmp_path, "train")
    assert after.num_products == 5 and after.fingerprint != before.fingerprint
    make_split(tmp_path, products=5, tars=1)
    (tmp_path / "train-000001.tar").unlink()
    assert ShardIndex.open(tmp_path, "train").num_products == 5


def test_moved_and_damaged_index_files_are_no_obstacle(tmp_path):
    before = ShardIndex.open(make_split(tmp_path), "train")
    for tar in tmp_path.glob("*.tar"):
        os.utime(tar, (1, 1))
    assert ShardIndex.open(tmp_path, "train").fingerprint == before.fingerprint
    path = tmp_path / "train.index.npz"
    path.write_bytes(path.read_bytes()[:500])
    assert ShardIndex.open(tmp_path, "train").fingerprint == before.fingerprint
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda arrays: arrays.pop("keys_blob"),
        lambda arrays: arrays.pop("stamp"),
        lambda arrays: arrays.update(stamp=arrays["stamp"].ravel()),
        lambda arrays: arrays.update(version=np.array(1)),
        lambda arrays: arrays.update(image_offset=arrays["image_offset"].astype(object)),
    ],
)
def test_index_of_another_make_is_built_again(tmp_path, edit):
    before = ShardIndex.open(make_split(tmp_path), "train")
    path = tmp_path / "train.index.npz"
    arrays = dict(np.load(path))
    edit(arrays)
    np.savez(path, **arrays)
    again = ShardIndex.open(tmp_path, "train")
    assert again.fingerprint == before.fingerprint and again.image_key(41) == before.image_key(41)


def test_read_only_disk_is_no_obstacle(tmp_path, monkeypatch):
    make_split(tmp_path)

    def refuse(own):
        def method(self, *rest, **options):
            if self.suffix == ".tmp":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return own(self, *rest, **options)

        return method

    for name in ("open", "unlink"):  # Linux says so before it looks whether there is a file to delete
        monkeypatch.setattr(Path, name, refuse(getattr(Path, name)))
    assert ShardIndex.open(tmp_path, "train").num_products == 7
    assert not (tmp_path / "train.index.npz").exists()


def test_splits_do_not_mix(tmp_path):
    make_split(tmp_path, "train")
    make_split(tmp_path, "train-extra", products=2)
    assert ShardIndex.open(tmp_path, "train").num_products == 7
    assert ShardIndex.open(tmp_path, "train-extra").num_products == 2


def test_pickled_index_reads_from_threads(tmp_path):
    index = ShardIndex.open(make_split(tmp_path), "train")
    index.read_image(0)
    copy = pickle.loads(pickle.dumps(index))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.read_image, range(42))) == [index.read_image(r) for r in range(42)]


def fails(folder, *parts):
    with pytest.raises(ValueError) as error:
        ShardIndex.open(folder, "train")
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_no_tar(tmp_path):
    fails(tmp_path, str(tmp_path), "no train-000000.tar")
    fails(tmp_path / "nowhere", "no train-000000.tar")


@pytest.mark.parametrize("name", ["00000.tar", "train-000000.tar.gz", "train.tgz", "test-000000.tar"])
def test_tars_of_other_names_are_listed(tmp_path, name):
    (tmp_path / name).touch()
    fails(tmp_path, "no train-000000.tar", f"it holds {name}: shards are plain tars, numbered from 0")


def test_what_stands_in_place_of_a_tar(tmp_path):
    """A link of a data store whose file was not fetched; a pipe, which would be waited for without end."""
    path = tmp_path / "train-000000.tar"
    path.symlink_to(".git/annex/objects/x.tar")
    fails(tmp_path, "train-000000.tar", "a link to what is not there (.git/annex/objects/x.tar); fetch it")
    path.unlink()
    os.mkfifo(path)
    fails(tmp_path, "train-000000.tar", "not a file but")


def test_tar_missing_in_the_middle_and_at_the_end(tmp_path):
    make_split(tmp_path, tars=3)
    ShardIndex.open(tmp_path, "train")
    (tmp_path / "train-000002.tar").rename(tmp_path / "away")
    fails(tmp_path, "train-000002.tar is missing")
    (tmp_path / "away").rename(tmp_path / "train-000002.tar")
    (tmp_path / "train-000001.tar").unlink()
    fails(tmp_path, "train-000001.tar is missing")


def test_two_tars_of_one_number(tmp_path):
    make_split(tmp_path, tars=2)
    (tmp_path / "train-1.tar").write_bytes((tmp_path / "train-000001.tar").read_bytes())
    fails(tmp_path, "train-1.tar: has the number of train-000001.tar")


@pytest.mark.parametrize("keep", [0, 100, 700, 5_000, -11_000, -512 * 19])
def test_truncated_tar(tmp_path, keep):
    make_split(tmp_path, tars=1)
    path = tmp_path / "train-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    fails(tmp_path, "train-000000.tar", "truncated")


def test_tar_cut_exactly_after_a_member(tmp_path):
    write_tar(tmp_path / "train-000000.tar", [sample()])
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(512 * 7, b"\0")[: 512 * 7])
    fails(tmp_path, "truncated")


def test_overwritten_header(tmp_path):
    make_split(tmp_path, tars=1)
    path = tmp_path / "train-000000.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"k003.json")
    data[at : at + 300] = b"x" * 300
    path.write_bytes(data)
    fails(tmp_path, f"damaged header at byte {at}")


def test_compressed_tar_is_refused(tmp_path):
    make_split(tmp_path, tars=1)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    fails(tmp_path, "train-000000.tar", "not a whole tar")


def test_empty_catalogue(tmp_path):
    write_tar(tmp_path / "train-000000.tar", [])
    fails(tmp_path, "train-000000.tar", "empty")


@pytest.mark.parametrize(
    "broken, parts",
    [
        (sample(title=""), ("k000.json", "no 'title'")),
        (sample(title=None), ("k000.json", "no 'title'")),
        (sample(1, 1, images=[{"file": "009.jpg"}]), ("k001.json", "'009.jpg'")),
        (sample(1, 1, images=[{"file": "000.jpg", "source": "moon"}]), ("k001.json", "'moon'", "customer")),
        (sample(1, 1, images=[{"file": "000.jpg", "colour": "red"}]), ("k001.json", "not a product record")),
        (sample(catalog=7), ("k000.json", "catalog is 7", "in quotes")),
        (sample(catalog=None), ("k000.json", "catalog is None")),
        (sample(title="half \ud83d"), ("k000.json", "title is 'half", "half a character")),
        (sample(1, 1, images=[{"file": "000.jpg", "sku": 12}]), ("k001.json", "images[0].sku is 12")),
        (sample(1, 1, images=[{"file": 0}]), ("k001.json", "images[0].file is 0")),
        (sample(1, 1, images=[{"file": "000.jpg", "source": ["ad"]}]), ("k001.json", "images[0].source is ['ad']")),
        (sample(1, 1, images=[{"file": "000.jpg", "title": None}]), ("k001.json", "images[0].title is None")),
        (sample(1, 1, images=[{"source": "ad"}]), ("k001.json", "images[0] has no 'file'")),
        (sample(1, 1, images=["000.jpg"]), ("k001.json", "images[0] is '000.jpg', not an object")),
        (sample(1, 1, images=None), ("k001.json", "images is None; it must be a list")),
        (sample(1, 1, attributes=["red"]), ("k001.json", "attributes is ['red']; it must be an object")),
        (sample(1, 1, images=[{"file": "000.jpg", "width": "40"}]), ("images[0].width is '40'; it must be a number",)),
        (sample(1, 1, images=[{"file": "000.jpg", "height": None}]), ("images[0].height is None",)),
        (boxed([0, 0, 1]), ("images[0].instances[0].box is [0, 0, 1]; it must be four numbers",)),
        (boxed(["0", "0", "9", "9"]), ("instances[0].box is ['0', ",)),
        (("k", b'{"caption": "sofa", "url": "x"}', {"000.jpg": b"x"}), ("no 'title'", "(this one has: caption, url)")),
        (("k", b"", {"000.jpg": b"x"}), ("not valid JSON (empty)",)),
        (("k", b'{"title": "' + bytes(512) + b'"}', {"000.jpg": b"x"}), ("zeros from byte 11 on", "cut")),
        (("k", b"[" * 100_000, {"000.jpg": b"x"}), ("k.json", "not a product record")),
        (("k", b'{"title": "\xff"}', {"000.jpg": b"x"}), ("k.json", "not valid JSON")),
        (("k", b"{not json", {"000.jpg": b"x"}), ("k.json", "not valid JSON")),
        (("k", b"[]", {"000.jpg": b"x"}), ("k.json", "JSON object")),
        (("k", None, {"000.jpg": b"x"}), ("k.json is missing",)),
        (sample(count=0), ("k000.json", "no image")),
        (("k", record_bytes(), {"tif": b"II*"}), ("no image", "of jpeg, jpg, png, webp (its members: json, tif)")),
    ],
)  # fmt: skip
def test_broken_samples(tmp_path, broken, parts):
    write_tar(tmp_path / "train-000000.tar", [sample(5), broken])
    fails(tmp_path, "train-000000.tar", *parts)
    assert not (tmp_path / "train.index.npz").exists()


def test_key_twice(tmp_path):
    write_tar(tmp_path / "train-000000.tar", [sample(0)])
    write_tar(tmp_path / "train-000001.tar", [sample(0)])
    fails(tmp_path, "train-000001.tar", "k000", "twice")
