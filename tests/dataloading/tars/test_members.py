"""Scanning tars: of other programs as they come, and one line for each that is not whole."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile

import pytest

from eclip.dataloading.errors import DataError
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.tars.members import read_samples
from tests.dataloading.fixtures import jpeg, make_split

NAME = "train-000000.tar"
RECORD = json.dumps({"title": "Red sofa", "product": "p", "category": "sofa"}).encode()
PRODUCT_PARTS = {"json": RECORD, "000.jpg": jpeg(0)}
PRODUCT = {"k.json": RECORD, "k.000.jpg": jpeg(0)}


def write(path, members, **options):
    """members: names (or TarInfos) and contents, one after the other."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def keys(folder):
    index = ShardIndex.open(folder, "train")
    return [index.image_key(row) for row in range(index.num_images)]


def fails(folder, *parts):
    with pytest.raises(ValueError) as error:
        ShardIndex.open(folder, "train")
    message = str(error.value)
    assert "\n" not in message and NAME in message
    for part in parts:
        assert part in message, message
    assert not (folder / "train.index.npz").exists()


@pytest.fixture
def tar(tmp_path):
    """Six products in one tar, and where their members' headers stand."""
    path = make_split(tmp_path, products=6, images=2, tars=1) / NAME
    with tarfile.open(path) as file:
        headers = {info.name: info.offset for info in file}
    return path, bytearray(path.read_bytes()), headers


@pytest.mark.parametrize("member", ["k002.json", "k002.001.jpg", "k000.000.jpg", "k005.001.jpg"])
@pytest.mark.parametrize("length", [512, 1024, 10_240 * 3 + 77])
@pytest.mark.parametrize("filling", [b"\0", b"\xa5"])
def test_hole_at_a_header(tar, member, length, filling):
    path, data, headers = tar
    at = headers[member]
    if at + length >= headers["k005.001.jpg"] + 512 and filling == b"\0" and length > 2000:
        length = 512  # longer ones would reach the end: see the test below
    data[at : at + length] = filling * length
    path.write_bytes(data)
    fails(path.parent, "zeros at byte" if filling == b"\0" else "damaged header at byte", f"byte {at}", "again")


def test_hole_at_the_very_beginning(tar):
    path, data, _ = tar
    data[:512] = bytes(512)
    path.write_bytes(data)
    fails(path.parent, "zeros at byte 0", "after its beginning")


def test_file_of_zeros(tar):
    path, data, _ = tar
    path.write_bytes(bytes(len(data)))
    fails(path.parent, f"empty: {len(data)} bytes of zeros")


def test_tars_put_one_behind_the_other(tmp_path):
    first = write(tmp_path / "a", PRODUCT).read_bytes()
    second = write(tmp_path / "b", {"m.json": RECORD, "m.000.jpg": jpeg(1)}).read_bytes()
    (tmp_path / NAME).write_bytes(first + second)
    fails(tmp_path, f"data again at byte {len(first)}", "two tars", "its own number")
    (tmp_path / NAME).write_bytes(first + b"junk")
    fails(tmp_path, f"data again at byte {len(first)}", "a hole")


@pytest.mark.parametrize("zeros", [512, 1024, 1536, 10_240, 3_000_000])
def test_any_number_of_zeros_may_end_a_tar(tmp_path, zeros, caplog):
    path = write(tmp_path / NAME, PRODUCT)
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512 + zeros)
    path.write_bytes(data)
    assert keys(tmp_path) == ["k/000.jpg"]
    assert ("if its download was cut" in caplog.text) == (zeros > 2**20)


@pytest.mark.parametrize("at", [700, 900, 20_000, 20_700, 40_100])
def test_download_cut_into_a_preallocated_file(tmp_path, at):
    """Zeros from any byte of a member's data on, to the end: the next header looks like the mark that ends a tar."""
    path = write(tmp_path / NAME, {f"k{i:02d}.{n}": c.ljust(700) for i in range(30) for n, c in PRODUCT_PARTS.items()})
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes(len(data) - at))
    fails(tmp_path, "ends in zeros", "a download that was cut")


def test_every_truncation_is_named(tmp_path):
    """At any byte: inside headers, data, padding; 4,000 lengths would take a minute, so every 97th of them."""
    path = write(tmp_path / NAME, {**PRODUCT, "m.json": RECORD, "m.000.jpg": jpeg(1)})
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for length in [*range(0, end, 97), end, end + 511]:
        path.write_bytes(data[:length])
        with path.open("rb") as file, pytest.raises(DataError, match="truncated|not a whole tar"):
            read_samples(file, path)
    with path.open("r+b") as file:
        file.write(data[: end + 512])
        file.seek(0)
        assert list(read_samples(file, path)) == ["k", "m"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (gzip.compress, "gzip"),
        (bz2.compress, "bzip2"),
        (lzma.compress, "xz"),
        (lambda data: b"<!DOCTYPE html><html>", "a web page"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda data: b"<?xml version='1.0'?><Error><Code>AccessDenied", "an XML text"),
        (lambda data: b"PK\x03\x04" + data, "a ZIP archive"),
        (lambda data: b"", "an empty file"),
        (lambda data: os.urandom(2000), "not a whole tar"),
    ],
)
def test_what_is_no_tar_is_told(tmp_path, change, words):
    path = write(tmp_path / NAME, PRODUCT)
    path.write_bytes(change(path.read_bytes()))
    fails(tmp_path, words)


def test_folder_or_forbidden_file_in_place_of_a_tar(tmp_path):
    (tmp_path / NAME).mkdir()
    fails(tmp_path, "cannot be read", "directory")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    long = "folder/" * 20 + "x" * 120
    members = {
        f"{long}.json": RECORD,
        f"{long}.000.jpg": jpeg(0),
        "沙发.json": RECORD,
        "沙发.000.jpg": jpeg(1),
    }
    write(tmp_path / NAME, members, format=format)
    assert keys(tmp_path) == [f"{long}/000.jpg", "沙发/000.jpg"]
    assert ShardIndex.open(tmp_path, "train").read_image(1) == jpeg(1)


def test_names_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path / NAME, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in (("canapé.json", RECORD), ("canapé.000.jpg", jpeg(0))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert keys(tmp_path) == ["canap\\xe9/000.jpg"]


def test_names_that_would_break_a_line(tmp_path):
    write(tmp_path / NAME, {"a\nb\x1b[31m.json": RECORD, "a\nb\x1b[31m.000.jpg": jpeg(0)})
    assert keys(tmp_path) == ["a\\nb\\x1b[31m/000.jpg"]


@pytest.mark.parametrize(("kind", "option"), [(b"D", "--listed-incremental"), (b"M", "--multi-volume")])
def test_tars_that_hold_a_part_of_something(tmp_path, kind, option):
    info = tarfile.TarInfo("./")
    info.type = kind
    write(tmp_path / NAME, [(info, b""), *PRODUCT.items()])
    fails(tmp_path, f"tar {option}, which is not read here")


def test_dot_slash_folders_and_what_file_managers_leave(tmp_path):
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    write(
        tmp_path / NAME,
        [
            (folder, b""),
            ("./._k.json", b"\0\5\26\7junk"),
            ("./k.json", RECORD),
            ("./._k.000.jpg", b"\0\5\26\7junk"),
            ("./k.000.jpg", jpeg(0)),
            ("./.DS_Store", b"Bud1"),
            ("__MACOSX/._m.json", b"junk"),
            ("__MACOSX/m.json", b"junk"),
            ("PaxHeaders.123/k.json", b"30 mtime=1"),
            (".ipynb_checkpoints/k.json", b"{}"),
            ("README.md", b"hello"),
            ("labels.txt", b"hello"),
            ("../k.json", RECORD),
            ("../k.000.jpg", jpeg(1)),
        ],
    )
    assert keys(tmp_path) == ["k/000.jpg", "../k/000.jpg"]


def test_members_of_a_sample_need_not_stand_together(tmp_path):
    records = {p: json.dumps({"title": f"t{p}", "product": p, "category": "c"}).encode() for p in "abc"}
    images = {f"{p}.{i:03d}.jpg": jpeg(ord(p) + i) for i in range(2) for p in "cab"}
    write(tmp_path / NAME, {f"{p}.json": records[p] for p in "abc"} | images)
    index = ShardIndex.open(tmp_path, "train")
    assert [index.image_key(r) for r in range(6)] == [f"{p}/{i:03d}.jpg" for p in "abc" for i in range(2)]
    assert [index.read_image(r) for r in range(6)] == [jpeg(ord(p) + i) for p in "abc" for i in range(2)]


def test_suffixes_in_capitals(tmp_path):
    record = {**json.loads(RECORD), "images": [{"file": "001.jpg", "source": "ad"}]}
    write(tmp_path / NAME, {"K.JSON": json.dumps(record).encode(), "K.000.PNG": b"x", "K.001.JPG": jpeg(0)})
    index = ShardIndex.open(tmp_path, "train")
    assert [index.image_key(r) for r in range(2)] == ["K/001.jpg", "K/000.PNG"]
    assert index.read_image(0) == jpeg(0) and index.image_source.tolist() == [2, 0]


@pytest.mark.parametrize("twice", ["k.json", "k.000.jpg"])
def test_member_twice(tmp_path, twice):
    write(tmp_path / NAME, [*PRODUCT.items(), (twice, b"other")])
    fails(tmp_path, repr(twice), "occurs twice, at bytes", "tar -r")


def test_hard_links_are_what_they_link_to(tmp_path):
    same = link("k.001.jpg", "k.000.jpg", tarfile.LNKTYPE)
    blob = link("m.000.jpg", "./blobs/abc", tarfile.LNKTYPE)
    write(tmp_path / NAME, [("blobs/abc", jpeg(5)), *PRODUCT.items(), same, ("m.json", RECORD), blob])
    index = ShardIndex.open(tmp_path, "train")
    assert keys(tmp_path) == ["k/000.jpg", "k/001.jpg", "m/000.jpg"]
    assert [index.read_image(r) for r in range(3)] == [jpeg(0), jpeg(0), jpeg(5)]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (link("k.001.jpg", "nowhere.jpg", tarfile.LNKTYPE), ("hard link to 'nowhere.jpg'", "--hard-dereference")),
        (link("k.001.jpg", "/store/1.jpg", tarfile.SYMTYPE), ("symbolic link to '/store/1.jpg'", "--dereference")),
        (link("m.json", "k.json", tarfile.SYMTYPE), ("'m.json'", "symbolic link")),
    ],
)
def test_links_that_lead_nowhere(tmp_path, extra, words):
    write(tmp_path / NAME, [*PRODUCT.items(), extra])
    fails(tmp_path, *words)


def test_sparse_members(tmp_path):
    (tmp_path / "k.json").write_bytes(RECORD)
    with (tmp_path / "k.000.jpg").open("wb") as file:
        file.seek(1 << 20)
        file.write(jpeg(0))
    subprocess.run(
        ["tar", "--sparse", "-cf", NAME, "k.json", "k.000.jpg"], cwd=tmp_path, check=True, capture_output=True
    )
    fails(tmp_path, "'k.000.jpg' is stored sparse", "without --sparse")


def test_tar_of_the_command_line(tmp_path):
    for name, content in PRODUCT.items():
        (tmp_path / name).write_bytes(content)
    subprocess.run(["tar", "--posix", "-cf", NAME, "./k.json", "./k.000.jpg"], cwd=tmp_path, check=True)
    index = ShardIndex.open(tmp_path, "train")
    assert index.image_key(0) == "k/000.jpg" and index.read_image(0) == jpeg(0)


def test_members_of_no_bytes(tmp_path):
    write(tmp_path / NAME, {**PRODUCT, "k.001.jpg": b""})
    index = ShardIndex.open(tmp_path, "train")
    assert index.num_images == 2 and index.read_image(1) == b""
    write(tmp_path / NAME, {**PRODUCT, "m.json": b"", "m.000.jpg": b"x"})
    (tmp_path / "train.index.npz").unlink()
    fails(tmp_path, "m.json: not valid JSON")


def test_images_without_a_record_are_named(tmp_path):
    write(tmp_path / NAME, {"k.1.json": RECORD, "k.1.000.jpg": jpeg(0)})
    with pytest.raises(ValueError) as error:
        ShardIndex.open(tmp_path, "train")
    assert "k.1.json" in str(error.value)
