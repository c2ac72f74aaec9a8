"""Reading while tars change, vanish or are too many for the limit of open files."""

import errno
import os
import pickle
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eclip.dataloading.errors import DataError
from eclip.dataloading.images import CorruptImageError
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.tars import open_tars
from eclip.dataloading.tars.open_tars import OpenTars
from eclip.dataloading.text import Tokenizer
from tests.dataloading.fixtures import jpeg, make_split


@pytest.fixture
def index(tmp_path):
    return ShardIndex.open(make_split(tmp_path, products=4, images=3, tars=2), "train")


def fails(index, row, *parts):
    with pytest.raises(DataError) as error:
        index.read_image(row)
    message = str(error.value)
    assert not isinstance(error.value, CorruptImageError) and "\n" not in message
    for part in parts:
        assert part in message, message


def cut(path: Path, keep: int):
    os.truncate(path, keep)


def test_cut_while_open(index):
    index.read_image(0)
    size = index.tars[0].stat().st_size
    cut(index.tars[0], 6000)
    fails(index, 5, "train-000000.tar", "k001/002.jpg has 0 of its", f"had {size} bytes (6000 bytes now)", "--resume")
    assert index.read_image(0) == jpeg(0)  # what is still there


def test_cut_within_the_image(index):
    span = index._image_span
    index.read_image(5)
    cut(index.tars[0], int(span[0][5]) + 100)
    fails(index, 5, "k001/002.jpg has 100 of its")


def test_cut_before_it_is_opened(index):
    cut(index.tars[1], 20_000)
    fails(index, 11, "train-000001.tar", "was to be read from a tar of", "20000 bytes now")


def test_product_of_a_cut_tar(index):
    cut(index.tars[1], 512)
    with pytest.raises(DataError, match=r"k003\.json"):
        index.product(3)


def test_replaced_by_another(index, tmp_path):
    other = make_split(tmp_path / "other", products=4, images=3, tars=2, image=lambda p, i: jpeg(7 * p + i, 50, 50))
    os.replace(other / "train-000000.tar", index.tars[0])
    fails(index, 1, "train-000000.tar", "truncated or replaced")


def test_replaced_by_another_of_its_size(index):
    data = index.tars[0].read_bytes()
    index.tars[0].write_bytes(b"x" * len(data))
    os.utime(index.tars[0], (1, 1))
    fails(index, 1, "not at byte", "truncated or replaced")
    index.tars[0].write_bytes(data)  # put back: only its time of change is another
    assert index.read_image(1) == jpeg(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden(index):
    index.tars[0].chmod(0)
    fails(index, 0, "cannot be read (Permission denied)")


def test_deleted(index):
    index.read_image(0)
    index.tars[0].unlink()
    assert index.read_image(1) == jpeg(1)  # open files live on
    index.tars[1].unlink()
    fails(index, 11, "train-000001.tar", "k003/002.jpg cannot be read (No such file or directory)", "--resume")


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_store_that_hangs_up(index, monkeypatch, code):
    real, failing = os.pread, [True]

    def pread(fd, size, offset):
        if failing:
            failing.pop()
            raise OSError(code, os.strerror(code))
        return real(fd, size, offset)

    monkeypatch.setattr(open_tars.os, "pread", pread)
    assert index.read_image(0) == jpeg(0)  # opened again
    failing += [True, True]
    fails(index, 0, "train-000000.tar", f"k000/000.jpg cannot be read ({os.strerror(code)})")


@pytest.mark.parametrize(("decoder", "workers"), [("torch", 0), ("torch", 2), ("dali", 1)])
def test_loader_says_the_same_whatever_decodes(index, decoder, workers):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    tokenizer = Tokenizer.train(index.texts(), vocab_size=128)
    for tar in index.tars:
        cut(tar, 6000)
    loader = ProductLoader(
        index, tokenizer, global_batch_size=2, image_size=16, decoder=decoder, num_workers=workers, max_tokens=12
    )
    with pytest.raises(DataError) as error:
        next(iter(loader))
    assert str(error.value).startswith(str(index.data_dir)) and "truncated or replaced" in str(error.value)
    assert "\n" not in str(error.value) and not loader.corrupt


def test_fewer_open_than_the_limit(tmp_path):
    """`ulimit -n 64` with 100 tars, read by threads in another process; files the program has open count too."""
    make_split(tmp_path, products=100, images=1, tars=100, image=lambda p, i: bytes([p]) * 600)
    ShardIndex.open(tmp_path, "train")
    script = f"""
import os, random, resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from eclip.dataloading.shards import ShardIndex
index = ShardIndex.open(Path({str(tmp_path)!r}), "train")
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
rows = [row for _ in range(20) for row in random.Random(0).sample(range(100), 100)]
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(index.read_image, rows)) == [bytes([row]) * 600 for row in rows]
assert len(os.listdir("/proc/self/fd")) <= 60
more = []
try:
    while True:
        more.append(os.open("/dev/null", os.O_RDONLY))  # somebody else takes all that is left
except OSError:
    pass
assert all(index.read_image(row) == bytes([row]) * 600 for row in rows[:300])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_file_left_to_open(index, monkeypatch):
    def refuse(path, flags):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(open_tars.os, "open", refuse)
    fails(index, 0, "train-000000.tar", "ulimit -n")


def test_limit_follows_the_system(monkeypatch):
    used = len(os.listdir("/proc/self/fd"))
    for soft, most in ((256, (256 - used) // 2), (1 << 20, 256), (used, 1), (resource.RLIM_INFINITY, 256)):
        monkeypatch.setattr(open_tars.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert abs(open_tars.most_open() - most) <= 1


def test_file_let_go_while_a_thread_reads(index, monkeypatch):
    """The reader's file closes after its read, not when its place is given to another."""
    real, reading, go_on = os.pread, threading.Event(), threading.Event()

    def slow(fd, size, offset):
        if not reading.is_set():
            reading.set()
            assert go_on.wait(60)
        return real(fd, size, offset)

    monkeypatch.setattr(open_tars.os, "pread", slow)
    monkeypatch.setattr(open_tars, "most_open", lambda: 1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(index.read_image, 0)
        assert reading.wait(60)
        assert index.read_image(11) == jpeg(302)
        go_on.set()
        assert first.result() == jpeg(0)


def test_pickles_without_its_files(index):
    index.read_image(0)
    copy = pickle.loads(pickle.dumps(index._open))
    assert isinstance(copy, OpenTars) and not copy._files and copy.stamps == index._open.stamps
