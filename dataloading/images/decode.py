"""From an image's bytes to upright 8-bit sRGB pixels, whatever Pillow's modes and moods.

Packing, the torch decoder and, for what DALI shows otherwise, the DALI path all come here, so an image has the same
pixels whichever way it goes: EXIF orientation baked in, ICC profile converted to sRGB, 16 bits scaled to 8, transparent
pixels on white, CMYK and palettes resolved, of an animation the first frame.
"""

import ctypes
import io
import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..file_kinds import HEAD, file_kind
from .colour import to_srgb
from .corrupt import CorruptImageError, check_pixels, rejecting

STORED = ("JPEG", "PNG", "WEBP")
"""Formats of the images in shards."""
_HEIC = tuple(b"ftyp" + brand for brand in b"heic heix heim heis hevc hevx mif1 msf1 heif".split())
_UNREAD = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\0\x05\x16\x07", "macOS's file of attributes (._ in front of an image's name)"),
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Damage is told by CorruptImageError; Pillow's and libtiff's remarks about it would be lines of stderr for every odd
# photo. Set once: warnings.catch_warnings is not safe in threads, and packing decodes in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with suppress(AttributeError, OSError):  # a Pillow without libtiff, or with one whose functions cannot be reached
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8: that tag alone is read, since what else stands in the block may be broken."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own getexif decodes the pixels
    except Exception:  # a block that cannot be parsed says nothing of how the camera was held
        return 1
    return turn if isinstance(turn, int) and turn in _TURNS else 1


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header is parsed and whose pixels are not decoded yet."""

    image: Image.Image
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height once upright, pixels."""
        width, height = self.image.size
        return (height, width) if self.orientation >= 5 else (width, height)


def _kind(data: bytes) -> str:
    """What a file is that Pillow knows not to be an image it reads, as a reason; "" for one not known here."""
    kind = "HEIC" if data[4:12] in _HEIC else next((kind for start, kind in _UNREAD if data.startswith(start)), None)
    kind = "SVG" if b"<svg" in data[:HEAD] else kind
    if kind:
        return f"{kind} is not read here: convert to JPEG first"
    return f"no image but {kind}" if (kind := file_kind(data[:HEAD])) else ""


def open_image(data: bytes, formats: tuple[str, ...] = STORED) -> OpenedImage:
    """Parse the header of an image's bytes. Raises CorruptImageError, for more than MAX_PIXELS too."""
    if not data:
        raise CorruptImageError("empty file")
    kinds = ", ".join(STORED) if formats is STORED else "image"
    with rejecting(f"not a readable {kinds} header"):
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError as error:
            reason = _kind(data) or f"not a readable {kinds} header"
            raise CorruptImageError(reason, f"starts with {data[:12]!r}") from error
        check_pixels(*image.size)
        if image.format == "PNG" and "exif" not in image.info and b"eXIf" in data:
            image.load()  # the block may stand behind the pixels
        return OpenedImage(image, _orientation(image))


def _grey(image: Image.Image) -> Image.Image:
    """16-bit grey as L or LA, 0..65535 scaled to 0..255. Raises CorruptImageError for 32-bit pixels."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not sixteen:
        raise CorruptImageError(f"pixel format {image.mode}: convert to 8 bits a channel first")
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    top = 2 ** tags.get(258, (16,))[0] - 1 if image.format == "TIFF" else 65535  # BitsPerSample: 12 bits come unscaled
    grey = Image.fromarray(((values * 255 + top // 2) // top).clip(0, 255).astype(np.uint8))
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow minds in 8 bits only
        grey = Image.fromarray(255 - np.asarray(grey))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if profile := image.info.get("icc_profile"):
        grey.info["icc_profile"] = profile
    return grey


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an image if it is not yet: RGB, upright, in sRGB, transparent pixels on white.

    Raises CorruptImageError.
    """
    with rejecting("cannot be decoded"):
        clear = image.info.get("transparency")
        if isinstance(clear, tuple) and ";16" in str(getattr(image, "tile", "")):
            image.info["transparency"] = tuple(value >> 8 for value in clear)  # as decoding cuts the pixels to 8 bits
        image.load()
        check_pixels(*image.size)  # some formats tell their true size only now
        turn = _TURNS.get(_orientation(image))
        if image.mode == "RGB" and not image.info.keys() & {"icc_profile", "transparency"}:
            return image if turn is None else image.transpose(turn)
        if image.mode.startswith(("I", "F")):
            image = _grey(image)
        rgb = to_srgb(image)
        return rgb if turn is None else rgb.transpose(turn)
