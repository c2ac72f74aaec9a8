"""Images of any kind, as files or bytes, to upright sRGB pixels: the one place that knows Pillow's modes and moods.

The way of an image: bytes -> header -> pixels -> sRGB, or a CorruptImageError that says in one sentence what is wrong:
    decode.py     `open_image` parses the header, `upright_rgb` decodes, `encode_image` makes packing's JPEG of a file
    colour.py     pixels of any profile, CMYK, palettes and transparency to sRGB
    headers.py    `plain`: is this an image that every decoder, DALI's too, shows alike?
"""

from .decode import (
    MIN_SIDE,
    CorruptImageError,
    OpenedImage,
    check_pixels,
    encode_image,
    open_image,
    rejecting,
    upright_rgb,
)
from .headers import plain, plain_bytes

__all__ = [
    "MIN_SIDE",
    "CorruptImageError",
    "OpenedImage",
    "check_pixels",
    "encode_image",
    "open_image",
    "plain",
    "plain_bytes",
    "rejecting",
    "upright_rgb",
]
