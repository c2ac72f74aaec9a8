"""Images as shops have them: upright sRGB pixels, whatever their orientation, depth and transparency."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eclip.dataloading.images import CorruptImageError, encode_image, open_image, upright_rgb
from tests.dataloading.images.checks import pixels, put
from tests.dataloading.images.pictures import photo, png, png_chunk, save

# pytest takes the place of the filter that decode.py sets
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A little-endian EXIF block of raw (tag, type, count, value or offset) entries."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + struct.pack("<iI", -1, 1)


def turn(value: int, kind: int = 3) -> tuple[int, int, int, bytes]:
    return (0x112, kind, 1, struct.pack("<I", value))


TURNED = {
    "plain": exif(turn(6)),
    "as long": exif(turn(6, 4)),
    "negative resolution": exif(turn(6), (0x11A, 10, 1, struct.pack("<I", 38))),  # read as -1, cannot be written back
    "lost resolution": exif(turn(6), (0x11A, 5, 1, struct.pack("<I", 99_999))),
    "lost text": exif((0x10F, 2, 500, struct.pack("<I", 99_999)), turn(6)),
    "lost directory": exif(turn(6), (0x8769, 4, 1, struct.pack("<I", 99_999))),
    "directory of text": exif(turn(6), (0x8769, 2, 1, b"abc\0")),
}
UPRIGHT = {
    "0": exif(turn(0)),
    "9": exif(turn(9)),
    "65535": exif(turn(65535)),
    "text": exif((0x112, 2, 2, b"6\0\0\0")),
    "float": exif((0x112, 11, 1, struct.pack("<f", 6))),
    "negative": exif(turn(2**32 - 6, 9)),
    "no such type": exif(turn(6, 99)),
    "bytes": exif((0x112, 7, 4, b"\6\0\0\0")),
    "cut": exif(turn(6))[:20],
    "garbage": b"Exif\0\0" + b"hello" * 9,
    "empty": b"Exif\0\0",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_gives_its_orientation_and_no_trouble(tmp_path: Path, kind: str) -> None:
    for blocks, size in ((TURNED, (47, 61)), (UPRIGHT, (61, 47))):
        for name, block in blocks.items():
            data = save(photo(), kind, exif=block)
            assert encode_image(put(tmp_path, data))[1:] == size, name
            assert open_image(data).size == size, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations(orientation: int) -> None:
    corner = np.zeros((40, 60, 3), np.uint8)
    corner[:10, :20] = 255  # top left as stored
    shown = pixels(save(Image.fromarray(corner), "PNG", exif=exif(turn(orientation))))
    bright = [shown[0, 0, 0] > 0, shown[0, -1, 0] > 0, shown[-1, 0, 0] > 0, shown[-1, -1, 0] > 0]
    assert bright.index(True) == [0, 1, 3, 2, 0, 1, 3, 2][orientation - 1] and sum(bright) == 1
    wide = shown[0] if shown[0].any() else shown[-1]
    assert (wide[:, 0] > 0).sum() == (20 if orientation < 5 else 10)


def test_orientation_behind_the_pixels_of_a_png() -> None:
    data = save(photo(), "PNG")
    end = data.index(b"IEND") - 4
    data = data[:end] + png_chunk(b"eXIf", exif(turn(8))[6:]) + data[end:]
    assert open_image(data).size == (47, 61) and pixels(data).shape == (61, 47, 3)


def tiff12(values: list[int]) -> bytes:
    """A one-row TIFF of 12-bit grey; the number of values is even."""
    bits = "".join(f"{value:012b}" for value in values)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [(256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(body))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_sixteen_bits_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 64 * 40).round().astype(np.uint16).reshape(40, 64)
    ramp[0, 0] = 40000
    exact = np.round(ramp / 257).astype(int)
    image = Image.fromarray(ramp)
    kinds = {
        "png": png(ramp),
        "png rgb": png(np.stack([ramp] * 3, -1)),
        "png rgba": png(np.stack([ramp, ramp, ramp, np.full_like(ramp, 65535)], -1)),
        "png grey alpha": png(np.stack([ramp, np.full_like(ramp, 65535)], -1)),
        "tiff": save(image, "TIFF"),
        "tiff lzw": save(image, "TIFF", compression="tiff_lzw"),
        "tiff, white is 0": save(Image.fromarray(65535 - ramp), "TIFF").replace(
            struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0)
        ),
        "tiff big endian": save(Image.frombytes("I;16B", (64, 40), ramp.astype(">u2").tobytes()), "TIFF"),
        "pgm": b"P5 64 40 65535\n" + ramp.astype(">u2").tobytes(),
        "jpeg 2000": save(image, "JPEG2000"),
    }
    for name, data in kinds.items():
        shown = pixels(data).astype(int)
        assert shown[0, 0].tolist() == [156] * 3, name
        assert np.abs(shown - exact[..., None]).max() <= 1, name  # Pillow cuts 16-bit RGB where grey is rounded
    twelve = [0, 4095, 2048, 1000]
    assert pixels(tiff12(twelve))[0, :, 0].tolist() == [0, 255, 128, 62]


def test_transparent_colour_of_sixteen_bits() -> None:
    grey = np.full((40, 40), 40000, np.uint16)
    grey[:20] = 1000
    colour = np.stack([grey, grey // 2, grey // 3], -1)
    for data in (
        png(grey, png_chunk(b"tRNS", struct.pack(">H", 1000))),
        png(colour, png_chunk(b"tRNS", struct.pack(">HHH", 1000, 500, 333))),
    ):
        shown = pixels(data)
        assert shown[:20].min() == 255 and abs(int(shown[30, 30, 0]) - 156) <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_white_are_refused(mode: str) -> None:
    with pytest.raises(CorruptImageError, match=f"pixel format {mode}: convert to 8 bits"):
        upright_rgb(Image.new(mode, (40, 40), 7))
