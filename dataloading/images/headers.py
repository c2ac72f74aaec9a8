"""Which encoded images every decoder shows alike: 8-bit grey or RGB, upright, in sRGB and without transparency.

DALI may have these; the others are for decode.py. Packed images are all of this kind and are told by their bytes alone,
in 2 us; a photo with EXIF or an ICC profile is opened with Pillow to see what they say, in 30 us.
"""

from collections.abc import Iterator

from .colour import is_srgb
from .decode import OpenedImage

_PNG = b"\x89PNG\r\n\x1a\n"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive JPEG
_TELLING = (0xE1, 0xE2, 0xEE)  # EXIF and XMP; ICC and more pictures; Adobe's colours
_SCAN = 0xDA


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Names of a PNG's chunks and where their contents begin."""
    position = len(_PNG)
    while position + 8 <= len(data):
        yield data[position + 4 : position + 8], position + 8
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _plain_jpeg(data: bytes) -> bool:
    position, colours = 2, False
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _SCAN:
            return colours
        if marker in _TELLING:
            return False
        if marker in _FRAMES:
            colours = data[position + 4] == 8 and data[position + 9] in (1, 3)
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    return False


def _plain_png(data: bytes) -> bool:
    depth_and_kind = data[24:26]  # grey or RGB of 8 bits
    told = (b"tRNS", b"iCCP", b"eXIf", b"iTXt", b"zTXt", b"tEXt", b"acTL")  # EXIF and XMP stand in texts, too
    return depth_and_kind in (b"\x08\x00", b"\x08\x02") and not any(name in told for name, _ in png_chunks(data))


def plain_bytes(data: bytes) -> bool:
    """Whether the bytes alone show that any decoder gives the meant pixels. False: see `plain`."""
    if data.startswith(b"\xff\xd8\xff"):
        return _plain_jpeg(data)
    if data.startswith(_PNG):
        return _plain_png(data)
    return data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8 "  # lossy, without any of the extended header's things


def plain(opened: OpenedImage) -> bool:
    """Whether any decoder gives the pixels that `upright_rgb` gives."""
    image, info = opened.image, opened.image.info
    profile = info.get("icc_profile")
    return (
        opened.orientation == 1
        and image.mode in ("L", "RGB")
        and "transparency" not in info
        and not getattr(image, "is_animated", False)
        and info.get("adobe_transform") in (None, 1)
        and (image.format != "PNG" or [tile[3] for tile in getattr(image, "tile", ())] == [image.mode])
        and (profile is None or is_srgb(profile, image.mode))
    )
