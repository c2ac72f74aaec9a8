"""Valid images of every format that Pillow writes or reads, and ICC profiles written byte by byte."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""XYZ of red, green and blue, adapted to D50."""


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(mode: str = "RGB", width: int = 61, height: int = 47) -> Image.Image:
    """A smooth image of any mode; RGBA has all levels of alpha."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 4), np.uint8)
    smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.float32))
    if mode == "LAB":
        return Image.merge("LAB", smooth.convert("RGB").split())
    return smooth.convert(mode) if mode in ("RGBA", "LA") else smooth.convert("RGB").convert(mode)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, *chunks: bytes, interlace: bool = False) -> bytes:
    """A PNG of 8 or 16 bits a channel, grey or RGB, alpha or not: (H, W) or (H, W, C). `chunks` precede the pixels."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b""
    for y, x, dy, dx in steps if interlace else ((0, 0, 1, 1),):
        part = pixels[y::dy, x::dx].astype(pixels.dtype.newbyteorder(">"))
        rows += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, kind, 0, 0, interlace)
    body = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def _profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(0.9642, 1, 0.82491),
        **tags,
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, kind, space, connection)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(0.9642, 1, 0.82491)
    return head + bytes(128 - len(head)) + table + body


def rgb_profile(primaries: tuple[tuple[float, ...], ...] = ADOBE_RGB, gamma: float = 2.2) -> bytes:
    """An ICC profile of a display: XYZ of its primaries and a gamma."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    colours = {b"%cXYZ" % c: b"XYZ \0\0\0\0" + _fixed(*xyz) for c, xyz in zip(b"rgb", primaries, strict=True)}
    return _profile(b"RGB ", b"XYZ ", b"mntr", colours | {b"%cTRC" % c: curve for c in b"rgb"})


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey with a gamma."""
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))})


def cmyk_profile(red: tuple[int, int, int]) -> bytes:
    """An ICC profile of a press: yellow and magenta together give the Lab bytes `red`, any black gives black."""
    corners = [
        (0, 128, 128) if k else red if (c, m, y) == (0, 1, 1) else (255 - 80 * (c + m + y), 128, 128)
        for c, m, y, k in np.ndindex(2, 2, 2, 2)
    ]
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += 4 * bytes(range(256)) + np.array(corners, np.uint8).tobytes() + 3 * bytes(range(256))
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": table})


def exif_block() -> Image.Exif:
    """Orientation 6 (to be turned clockwise), some other tags and a sub-directory."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0})
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    return exif


def valid() -> Iterator[tuple[str, bytes]]:
    """Valid images by name; what this Pillow was built without is left out."""
    exif, icc = exif_block(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    def animated(kind: str) -> bytes:
        return save(photo(), kind, save_all=True, append_images=[photo("L").convert("RGB"), photo()])

    deep = np.random.default_rng(0).integers(0, 65536, (40, 44, 3)).astype(np.uint16)
    makers: dict[str, Callable[[], bytes]] = {
        "jpeg": lambda: save(photo(), "JPEG"),
        "jpeg progressive": lambda: save(photo(), "JPEG", progressive=True, subsampling=0),
        "jpeg grey": lambda: save(photo("L"), "JPEG"),
        "jpeg cmyk": lambda: save(photo("CMYK"), "JPEG"),
        "jpeg exif": lambda: save(photo(), "JPEG", exif=exif, comment="a comment"),
        "jpeg icc": lambda: save(photo(), "JPEG", icc_profile=rgb_profile(), restart_marker_blocks=4),
        "jpeg mpo": lambda: animated("MPO"),
        "png": lambda: save(photo(), "PNG", icc_profile=icc, exif=exif),
        "png 16 grey": lambda: save(photo("I;16"), "PNG"),
        "png 16": lambda: png(deep, png_chunk(b"tRNS", bytes(6))),
        "png palette": lambda: save(photo("P"), "PNG", transparency=bytes(range(0, 250, 10))),
        "png alpha": lambda: save(photo("RGBA"), "PNG"),
        "png grey alpha": lambda: save(photo("LA"), "PNG"),
        "png 1 bit": lambda: save(photo("1"), "PNG", transparency=0),
        "png animated": lambda: animated("PNG"),
        "png interlaced": lambda: png(np.asarray(photo()), interlace=True),
        "webp": lambda: save(photo(), "WEBP", exif=exif, icc_profile=icc),
        "webp lossless": lambda: save(photo("RGBA"), "WEBP", lossless=True),
        "webp animated": lambda: animated("WEBP"),
        "gif": lambda: save(photo("P"), "GIF", transparency=3),
        "gif animated": lambda: animated("GIF"),
        "bmp": lambda: save(photo(), "BMP"),
        "bmp palette": lambda: save(photo("P"), "BMP"),
        "tiff": lambda: save(photo(), "TIFF", exif=exif),
        "tiff lzw": lambda: save(photo(), "TIFF", compression="tiff_lzw", tiffinfo={317: 2}),
        "tiff deflate": lambda: save(photo("RGBA"), "TIFF", compression="tiff_adobe_deflate", icc_profile=icc),
        "tiff jpeg": lambda: save(photo("YCbCr"), "TIFF", compression="jpeg"),
        "tiff fax": lambda: save(photo("1"), "TIFF", compression="group4"),
        "tiff packbits": lambda: save(photo("P"), "TIFF", compression="packbits"),
        "tiff 16": lambda: save(photo("I;16"), "TIFF"),
        "tiff float": lambda: save(photo("F"), "TIFF"),
        "tiff cmyk": lambda: save(photo("CMYK"), "TIFF", icc_profile=cmyk_profile((140, 200, 180))),
        "tiff lab": lambda: save(photo("LAB"), "TIFF"),
        "tiff pages": lambda: animated("TIFF"),
        "jpeg 2000": lambda: save(photo(), "JPEG2000"),
        "jpeg 2000 tiled": lambda: save(photo("RGBA"), "JPEG2000", tile_size=(32, 32), irreversible=True),
        "avif": lambda: save(photo(), "AVIF", exif=exif, icc_profile=icc),
        "avif alpha": lambda: save(photo("RGBA"), "AVIF"),
        "ico": lambda: save(photo("RGBA"), "ICO", sizes=[(16, 16), (40, 40)]),
        "ico bmp": lambda: save(photo("RGBA"), "ICO", sizes=[(40, 40)], bitmap_format="bmp"),
        "icns": lambda: save(photo("RGBA", 64, 64), "ICNS"),
        "ppm": lambda: save(photo(), "PPM"),
        "pgm 16": lambda: b"P5 40 40 65535\n" + deep[:, :40, 0].tobytes(),
        "pgm text": lambda: b"P2\n# text\n40 40\n255\n" + b"17 200 " * 800,
        "tga": lambda: save(photo("RGBA"), "TGA"),
        "tga rle": lambda: save(photo(), "TGA", compression="tga_rle"),
        "pcx": lambda: save(photo("P"), "PCX"),
        "sgi": lambda: save(photo(), "SGI"),
        "dds": lambda: save(photo("RGBA"), "DDS"),
        "qoi": lambda: save(photo("RGBA"), "QOI"),
        "xbm": lambda: save(photo("1"), "XBM"),
        "psd": lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 40, 40, 8, 3) + bytes(14) + bytes(4800),
    }
    for name, make in makers.items():
        try:
            data = make()
        except (KeyError, OSError):  # built without the format's library, or an older Pillow
            continue
        yield name, data
