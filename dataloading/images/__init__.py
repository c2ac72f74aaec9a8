"""Images of any kind, as files or bytes, to upright sRGB pixels: the one place that knows Pillow's modes and moods.

The way of an image: bytes -> header -> pixels -> sRGB, or a CorruptImageError that says in one sentence what is wrong:
    decode.py     `open_image` parses the header, `upright_rgb` decodes
    colour.py     pixels of any profile, CMYK, palettes and transparency to sRGB
    crop.py       boxes of it: cut, widened, resized to a square
    encode.py     `encode_image`: a file to the JPEG that packing keeps
    corrupt.py    that error, and what makes it of whatever a decoder raises
    headers.py    `plain`: is this an image that every decoder, DALI's too, shows alike?
"""

from .corrupt import MAX_PIXELS, CorruptImageError, check_pixels, rejecting
from .crop import inside_image, resize_box, widen
from .decode import OpenedImage, open_image, upright_rgb
from .encode import MIN_SIDE, encode_image, file_formats, read_image_file
from .headers import plain, plain_bytes

__all__ = [
    "MAX_PIXELS",
    "MIN_SIDE",
    "CorruptImageError",
    "OpenedImage",
    "check_pixels",
    "encode_image",
    "file_formats",
    "inside_image",
    "open_image",
    "plain",
    "plain_bytes",
    "read_image_file",
    "rejecting",
    "resize_box",
    "upright_rgb",
    "widen",
]
