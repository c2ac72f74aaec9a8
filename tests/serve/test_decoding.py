"""Photos decoded in processes: the same pixels as in this one, and a process that hangs or dies takes nothing along."""

import io
import os
import struct
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image

from eclip.inference import read_picture
from eclip.serve.decoding import DecodePool
from eclip.serve.limits import Limits, Refusal
from tests.serve.conftest import photo

SIDE = 32
HANGS = "import time; main = lambda handle: time.sleep(60)"
DIES = "import os; main = lambda handle: os._exit(3)"


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    made = DecodePool(SIDE, Limits(pixels=200_000), workers=1)
    yield made
    made.close()


def refusal(pool: DecodePool, data: bytes, box: tuple[float, float, float, float] | None = None) -> Refusal:
    with pytest.raises(Refusal) as refused:
        pool.decode(data, box).result(30)
    assert "\n" not in refused.value.message
    return refused.value


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(photo(61, 37))).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("data", [photo(), photo(kind="PNG"), photo(500, 300), turned()])
@pytest.mark.parametrize("box", [None, (2.0, 3.0, 30.0, 90.0)])
def test_the_pixels_are_those_of_read_picture(
    pool: DecodePool, data: bytes, box: tuple[float, float, float, float] | None
) -> None:
    found, expected = pool.decode(data, box, margin=0.1).result(30), read_picture(data, SIDE, box, margin=0.1)
    assert found.size == expected.size
    assert found.square.equal(expected.square)


def test_what_cannot_be_decoded_is_said_in_one_line(pool: DecodePool) -> None:
    assert refusal(pool, b"no image").status == 422
    assert "empty file" in refusal(pool, b"").message
    assert "truncated" in refusal(pool, photo(500, 300)[:2000]).message
    outside = refusal(pool, photo(), (100, 100, 110, 110))
    assert outside.status == 422 and "60 x 40 px" in outside.message
    assert pool.decode(photo()).result(30).size == (60, 40)


def test_a_bomb_is_refused_by_its_header(pool: DecodePool) -> None:
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 99))
    bomb = b"\x89PNG\r\n\x1a\n"
    for chunk in chunks:
        bomb += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    refused = refusal(pool, bomb)
    assert refused.status == 422 and "more than 80 megapixels" in refused.message
    large = refusal(pool, photo(600, 400))
    assert (large.status, large.message) == (413, "photo: 600 x 400 px are more than 0.2 megapixels: make it smaller")


@pytest.mark.parametrize(
    "program, seconds, told", [(HANGS, 0.2, "not decoded within 0.2 s"), (DIES, 20.0, "its decoder crashed")]
)
def test_a_process_that_hangs_or_dies_is_replaced(program: str, seconds: float, told: str) -> None:
    pool = DecodePool(SIDE, Limits(decode_seconds=seconds), workers=1, program=program)
    try:
        for _ in range(2):
            refused = refusal(pool, photo())
            assert refused.status == 422 and told in refused.message
        assert len(pool.processes) == 1
    finally:
        pool.close()


def test_a_process_that_was_killed_between_two_photos_is_not_the_next_ones_fault(pool: DecodePool) -> None:
    pool.decode(photo()).result(30)
    (before,) = pool.processes
    os.kill(before, 9)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    assert pool.decode(photo()).result(30).size == (60, 40)
    assert pool.processes != [before]


def test_too_many_photos_are_refused() -> None:
    pool = DecodePool(SIDE, Limits(pending=2, decode_seconds=0.5), workers=1, program=HANGS)
    try:
        waiting = [pool.decode(photo()) for _ in range(2)]
        with pytest.raises(Refusal, match="busy: 2 photos wait") as refused:
            pool.decode(photo())
        assert refused.value.status == 503
    finally:
        pool.close()
    for future in waiting:
        assert future.cancelled() or future.exception(10)
    assert pool.processes == []
