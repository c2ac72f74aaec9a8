"""Files of every format, damaged ones and what is no image: a JPEG of the pixels, or a reason."""

import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from eclip.dataloading.images import CorruptImageError, encode_image
from tests.dataloading.images.checks import pixels, put, rejected
from tests.dataloading.images.pictures import exif_block, photo, png_chunk, rgb_profile, save, valid

# pytest takes the place of the filter that decode.py sets
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


def test_encode_image_resizes_and_keeps_small_ones(tmp_path: Path) -> None:
    data, width, height = encode_image(put(tmp_path, save(photo("RGB", 600, 400), "PNG")), short_side=100)
    assert (width, height) == (150, 100)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "JPEG" and picture.mode == "RGB" and picture.size == (150, 100)
    assert encode_image(put(tmp_path, save(photo("RGB", 60, 40), "PNG")))[1:] == (60, 40)
    assert encode_image(put(tmp_path, save(Image.new("RGB", (70_000, 400)), "PNG")))[1:] == (56_000, 320)


def test_jpegs_carry_nothing_but_pixels(tmp_path: Path) -> None:
    full = save(photo(), "JPEG", exif=exif_block(), icc_profile=rgb_profile(), comment="by us", dpi=(300, 300))
    with Image.open(io.BytesIO(encode_image(put(tmp_path, full))[0])) as picture:
        assert not picture.info.keys() & {"exif", "icc_profile", "comment", "dpi"}


@pytest.mark.parametrize("name, data", list(valid()))
def test_every_format(tmp_path: Path, name: str, data: bytes) -> None:
    path = put(tmp_path, data)
    if name == "tiff float":
        assert rejected(path).reason == "pixel format F: convert to 8 bits a channel first"
    elif name.startswith("ico"):
        assert rejected(path).reason == "smaller than 32 px"
        assert pixels(data).shape == (31, 40, 3)
    else:
        shown, width, height = encode_image(path, short_side=1024)
        assert np.asarray(Image.open(io.BytesIO(shown))).shape == (height, width, 3) == pixels(data).shape


def oversized() -> dict[str, bytes]:
    """Headers of 60,000 x 60,000 px over a few bytes of pixels."""
    side = 60_000
    jpeg, gif, bmp = bytearray(save(photo(), "JPEG")), bytearray(save(photo(), "GIF")), bytearray(save(photo(), "BMP"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", side, side)
    gif[6:10] = struct.pack("<HH", side, side)
    bmp[18:26] = struct.pack("<ii", side, side)
    tiff = save(photo(), "TIFF").replace(struct.pack("<HHII", 256, 4, 1, 61), struct.pack("<HHII", 256, 4, 1, side))
    tiff = tiff.replace(struct.pack("<HHII", 257, 4, 1, 47), struct.pack("<HHII", 257, 4, 1, side))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return {
        "png": b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(999))),
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "tiff": tiff,
        "ppm": b"P6 60000 60000 255\n" + bytes(99),
        "just over": save(Image.new("1", (9000, 9000)), "PNG"),
    }


@pytest.mark.parametrize("name, data", oversized().items())
def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    error = rejected(put(tmp_path, data))
    assert error.reason == "more than 80 megapixels" and error.detail


def unusable(folder: Path) -> dict[str, tuple[Path, str, str]]:
    """Path, reason and a part of the detail."""
    whole = save(photo("RGB", 200, 200), "JPEG")
    high, wide = (save(Image.new("L", size), "PNG") for size in ((1, 70_000), (70_000, 40)))
    made = {
        "cut jpeg": (put(folder, whole[: len(whole) // 2], "cut.jpg"), "truncated", "bytes not processed"),
        "cut png": (put(folder, save(photo(), "PNG")[:900], "cut.png"), "truncated", ""),
        "cut webp": (put(folder, save(photo(), "WEBP")[:300], "cut.webp"), "", ""),
        "a web page": (put(folder, b"<!DOCTYPE html><p>404", "404.jpg"), "no image but a web page", "<!DOCTYPE"),
        "lfs": (put(folder, b"version https://git-lfs.github.com/spec/v1\n", "l.jpg"), "but a Git LFS pointer", ""),
        "zeros": (put(folder, bytes(5000), "z.jpg"), "no image but zeros", ""),
        "text": (put(folder, b'{"error": "denied"}', "t.jpg"), "not a readable image header", '{"error": "d'),
        "heic": (put(folder, b"\0\0\0\x18ftypheic" + bytes(99), "i.heic"), "HEIC is not read here", ""),
        "heif": (put(folder, b"\0\0\0\x1cftypmif1" + bytes(99), "j.heic"), "HEIC is not read here", ""),
        "jpeg xl": (put(folder, b"\xff\x0a" + bytes(99), "i.jxl"), "JPEG XL is not read here", ""),
        "svg": (put(folder, b'<?xml version="1.0"?>\n<svg width="90"/>', "x.svg"), "SVG is not read here", ""),
        "pdf": (put(folder, b"%PDF-1.4\n", "x.pdf"), "PDF is not read here", ""),
        "eps": (put(folder, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n", "x.eps"), "PostScript is not", ""),
        "attributes": (put(folder, b"\0\x05\x16\x07" + bytes(99), "._a.jpg"), "macOS's file of attributes", ""),
        "empty": (put(folder, b"", "empty.png"), "empty file", ""),
        "small": (put(folder, save(photo("RGB", 20, 90), "PNG"), "s.png"), "smaller than 32 px", "20 x 90 px"),
        "a line": (put(folder, high, "l.png"), "smaller than 32 px", "1 x 70000 px"),
        "long": (put(folder, wide, "w.png"), "a side over 65500 px", "70000 x 40 px"),
        "folder": (folder, "not a regular file", ""),
        "device": (Path("/dev/zero"), "not a regular file", ""),
        "missing": (folder / "no.jpg", "file not found", ""),
        "below a file": (folder / "s.png" / "no.jpg", "cannot be read", "Not a directory"),
        "nul": (folder / "a\0b", "cannot be read", "null"),
        "surrogate": (folder / "a\ud800", "cannot be read", "UnicodeEncodeError"),
        "long name": (folder / ("n" * 300), "cannot be read", "too long"),
    }
    os.mkfifo(folder / "pipe")
    made["pipe"] = (folder / "pipe", "not a regular file", "")
    (folder / "loop").symlink_to(folder / "loop")
    made["loop"] = (folder / "loop", "cannot be read", "symbolic links")
    (folder / "dangling").symlink_to(folder / "nowhere")
    made["dangling"] = (folder / "dangling", "file not found", "")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(10**12)
    made["sparse"] = (folder / "sparse.png", "file of more than 640 MB", "1000000 MB")
    return made


def test_unusable_files_have_a_reason_that_groups(tmp_path: Path) -> None:
    for name, (path, reason, detail) in unusable(tmp_path).items():
        error = rejected(path)
        assert reason in error.reason and detail in error.detail, (name, error)
        assert "\n" not in str(error) and str(path) not in str(error) and " at 0x" not in str(error), name


def test_socket_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert rejected(Path("socket")).reason == "not a regular file"


ERRORS = [
    struct.error("x"), TypeError("x"), OSError("x"), RuntimeError("x"), AttributeError("x"), MemoryError(),
    IndexError(), KeyError("x"), ZeroDivisionError(), OverflowError("x"), SyntaxError("x"), zlib.error("x"),
    RecursionError(), EOFError(), StopIteration(), AssertionError(), UnicodeDecodeError("utf-8", b"", 0, 0, "x"),
    Image.DecompressionBombError("x"), Image.DecompressionBombWarning("x"), NotImplementedError(), UserWarning("x"),
    PermissionError(13, "x"), BufferError(),
]  # fmt: skip
STEPS = [
    (Image, "open"), (ImageFile.ImageFile, "load"), (Image.Image, "convert"), (Image.Image, "save"),
    (Path, "read_bytes"), (os, "stat"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("owner, method", STEPS, ids=lambda step: getattr(step, "__name__", step))
def test_any_exception_is_a_rejection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, method: str, error: Exception
) -> None:
    path = put(tmp_path, save(photo("L"), "PNG"))

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(owner, method, fails)
    found = rejected(path)
    assert found.reason and "\n" not in str(found)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_program_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type) -> None:
    def stops(_: object) -> None:
        raise stop

    path = put(tmp_path, save(photo(), "PNG"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", stops)
    with pytest.raises(stop):
        encode_image(path)


def test_errors_come_whole_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(CorruptImageError("truncated", "9 bytes")))
    assert (error.reason, error.detail, str(error)) == ("truncated", "9 bytes", "truncated (9 bytes)")


def test_half_written_jpeg_is_not_filled_with_grey(tmp_path: Path) -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        data = save(photo("RGB", 300, 300), "JPEG", **options)
        for share in (0.5, 0.9):
            assert rejected(put(tmp_path, data[: int(len(data) * share)])).reason == "truncated"


def test_encoder_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("encoder error -2")

    path = put(tmp_path, save(photo(), "PNG"))
    Image.init()  # or saving would register the encoder again
    monkeypatch.setitem(Image.SAVE, "JPEG", fails)
    assert str(rejected(path)) == "cannot be encoded (OSError: encoder error -2)"


def test_damaged_images_give_a_jpeg_or_a_reason_and_no_word_on_stderr() -> None:
    command = [sys.executable, "-m", "tests.dataloading.images.fuzz", "--count", "600", "--seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and not run.stderr, run.stdout + run.stderr
    summary, *reasons = run.stdout.strip().splitlines()
    packed, rejections, faults = (int(part.split()[0]) for part in summary.split(", ")[:3])
    assert packed > 60 and packed + rejections == 600 and not faults
    assert len(reasons) <= 12, reasons
