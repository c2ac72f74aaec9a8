"""Images of any kind to pixels: a path, the bytes of a file, a PIL image, an array; any size, any format Pillow reads.

The pixels are those of evaluation (`decode_square`): the upright image, or a box of it, squashed to the model's square.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eclip.dataloading.images import (
    CorruptImageError,
    OpenedImage,
    check_pixels,
    file_formats,
    open_image,
    read_image_file,
    rejecting,
    resize_box,
    upright_rgb,
    widen,
)
from eclip.dataloading.schema import Box

Picture = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[Any]
"""What is taken for an image: a file's path (str or Path), its bytes, an open binary file, a PIL image, or an array
(H, W, 3) of uint8 RGB; (H, W) is grey, (H, W, 4) has an alpha channel, which is put on white."""
_KINDS = "give a path, the bytes of an image file, an open one, a PIL image or a uint8 array (H, W, 3)"


@dataclass(frozen=True)
class Pixels:
    """What the model sees of an image, and how large that image is."""

    square: Tensor
    """(3, S, S) uint8 RGB."""
    size: tuple[int, int]
    """Width and height of the upright image, pixels."""


def is_picture(value: Any) -> bool:
    """Whether `value` is one image; an array of four dimensions is a collection, and a column of paths."""
    if isinstance(value, np.ndarray):
        return value.ndim < 4 and value.dtype.kind not in "OSUT"
    if isinstance(value, Tensor):
        return value.ndim < 4
    return hasattr(value, "read") or isinstance(value, str | Path | bytes | bytearray | memoryview | Image.Image)


def describe(picture: Any) -> str:
    """A name for messages: the path, or what kind of thing it is."""
    if isinstance(picture, str | Path):
        return str(picture)
    if isinstance(picture, bytes | bytearray | memoryview):
        return f"{len(picture)} bytes"
    if isinstance(picture, Image.Image):
        return f"a PIL image of {picture.width} x {picture.height} px"
    if isinstance(picture, np.ndarray):
        return f"an array {picture.shape} of {picture.dtype}"
    return f"a {type(picture).__name__}"


def read_picture(picture: Picture, size: int, box: Box | None = None, *, margin: float = 0.0) -> Pixels:
    """Decode an image, or a box of it, to the model's square of `size` pixels.

    box: x0, y0, x1, y1 in pixels of the upright image; what stands out of the image is cut off. margin: see `widen`.
    Raises CorruptImageError (a ValueError) for an image that cannot be read, ValueError for a box that holds nothing,
    TypeError for what is no image.
    """
    opened = _open(picture)
    width, height = upright = opened.size  # before decoding: a JPEG may be decoded to fewer pixels than it has
    inside = (0.0, 0.0, float(width), float(height)) if box is None else widen(box, upright, margin)
    array = resize_box(opened, inside, size)
    return Pixels(torch.from_numpy(array.transpose(2, 0, 1).copy()), upright)


def _open(picture: Any) -> OpenedImage:
    if isinstance(picture, str | Path):
        if str(picture).startswith(("http://", "https://", "s3://")):
            raise CorruptImageError("an address, and only files are read: fetch it first and give its bytes")
        return open_image(read_image_file(Path(picture)), file_formats())
    if isinstance(picture, bytes | bytearray | memoryview):
        return open_image(bytes(picture), file_formats())
    if hasattr(picture, "read"):
        return open_image(_read_file(picture), file_formats())
    if isinstance(picture, Tensor):
        raise TypeError(f"a tensor of shape {tuple(picture.shape)}: {_KINDS}, .permute(1, 2, 0).numpy() of a (3, H, W)")
    image = picture if isinstance(picture, Image.Image) else _of_array(picture)
    check_pixels(*image.size)
    with rejecting("cannot be decoded"):
        # A copy: the caller's image is neither turned nor made smaller. It is decoded in full, so nothing is drafted.
        return OpenedImage(upright_rgb(image.copy()), 1)


def _read_file(file: Any) -> bytes:
    content = file.read()
    if not isinstance(content, bytes):
        raise TypeError(f"a file opened as text: {_KINDS}, or open it with 'rb'")
    return content


def _of_array(array: Any) -> Image.Image:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"a {type(array).__name__} is no image: {_KINDS}")
    if array.dtype != np.uint8:
        raise TypeError(f"an array of {array.dtype}: {_KINDS}; (array * 255).round().astype('uint8') of one in [0, 1]")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise TypeError(f"an array of shape {array.shape}: {_KINDS}, channels last")
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def to_jpeg(picture: Picture, side: int, *, quality: int = 85) -> bytes:
    """A thumbnail: the whole image, upright, its longer side at most `side` pixels, as JPEG.

    Raises as `read_picture`.
    """
    opened = _open(picture)
    with rejecting("cannot be decoded"):
        opened.image.draft(None, (side, side))
        small = upright_rgb(opened.image)
        small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        small.info = {}
        out = io.BytesIO()
        small.save(out, "JPEG", quality=quality)
        return out.getvalue()
