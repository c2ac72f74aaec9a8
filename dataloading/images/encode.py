"""An image file to the JPEG that packing keeps: read, decoded in full, made smaller, and nothing but pixels."""

import io
import os
import stat
from functools import cache
from pathlib import Path

from PIL import Image

from .corrupt import MAX_PIXELS, CorruptImageError, rejecting, words
from .decode import STORED, open_image, upright_rgb

MIN_SIDE = 32
_MAX_SIDE = 65_500  # of a JPEG, by libjpeg
_MAX_BYTES = 8 * MAX_PIXELS  # what 16-bit RGBA takes uncompressed

# Without those that start another program (EPS), draw (WMF), or hold no pixels Pillow could read (stubs).
_FILES = (
    *STORED, "AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI",
    "TGA", "TIFF", "XBM", "XPM",
)  # fmt: skip


@cache
def file_formats() -> tuple[str, ...]:
    """The formats that are read from files: those of _FILES that this Pillow has; it fails on the name of another."""
    Image.init()
    return tuple(name for name in _FILES if name in Image.OPEN)


def read_image_file(path: Path) -> bytes:
    """The bytes of a regular file. Raises CorruptImageError; does not wait for a pipe or a device."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptImageError("not a regular file")
        if status.st_size > _MAX_BYTES:
            raise CorruptImageError(f"file of more than {_MAX_BYTES // 10**6} MB", f"{status.st_size / 1e6:.0f} MB")
        return path.read_bytes()
    except CorruptImageError:
        raise
    except FileNotFoundError:
        raise CorruptImageError("file not found") from None
    except OSError as error:
        raise CorruptImageError("cannot be read", error.strerror or type(error).__name__) from error
    except Exception as error:  # names with NUL or lone surrogates; a file larger than the memory
        raise CorruptImageError("cannot be read", words(error)) from error


def encode_image(path: Path, *, short_side: int = 320, quality: int = 90) -> tuple[bytes, int, int]:
    """Decode an image in full and encode it again as plain RGB JPEG, its short side at most `short_side` pixels.

    Returns the JPEG, its width and height. Raises CorruptImageError for whatever is wrong with this one image.
    """
    picture = upright_rgb(open_image(read_image_file(path), file_formats()).image)
    with rejecting("cannot be encoded"):
        if min(picture.size) < MIN_SIDE:
            raise CorruptImageError(f"smaller than {MIN_SIDE} px", f"{picture.width} x {picture.height} px")
        scale = short_side / min(picture.size)
        if scale < 1:
            size = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        if max(picture.size) > _MAX_SIDE:
            raise CorruptImageError(f"a side over {_MAX_SIDE} px", f"{picture.width} x {picture.height} px")
        picture.info = {}  # a comment of the file would be copied
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality)
        return out.getvalue(), picture.width, picture.height
