"""Boxes of an image: cut to what lies inside it, widened, and resized to a square.

What decodes photos alone imports this and no torch: eclip/serve starts processes of it.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .corrupt import rejecting
from .decode import OpenedImage, upright_rgb

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright image."""

# Bicubic, antialiased: what the published image towers were trained and evaluated with.
_FILTER = Image.Resampling.BICUBIC


def resize_box(opened: OpenedImage, box: Box, size: int) -> NDArray[np.uint8]:
    """(size, size, 3) RGB: a box (pixels of the upright image), resized; decodes `opened`. Raises CorruptImageError."""
    width, height = opened.size
    with rejecting("cannot be decoded"):
        wanted = (math.ceil(width * size / (box[2] - box[0])), math.ceil(height * size / (box[3] - box[1])))
        stored = opened.image.width
        # None for formats without a scaled decode.
        drafted = opened.image.draft(None, wanted if stored == width else wanted[::-1])
        shrink = stored / drafted[1][2] if drafted else 1.0
        x0, y0, x1, y1 = (c / shrink for c in box)
        image = upright_rgb(opened.image)
        inside = (x0, y0, min(x1, image.width), min(y1, image.height))
        return np.asarray(image.resize((size, size), _FILTER, box=inside))


def inside_image(box: Box, size: tuple[int, int]) -> Box:
    """The part of a box that lies within an image of `size` (width, height). Raises ValueError when none does."""
    numbers = tuple(box)
    if len(numbers) != 4 or not all(map(_is_finite, numbers)):
        raise ValueError(f"box {box!r}: give four numbers x0, y0, x1, y1 in pixels of the image")
    x0, y0, x1, y1 = map(float, numbers)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"box {box!r}: x0 < x1 and y0 < y1 are wanted (left, top, right, bottom, in pixels)")
    width, height = size
    cut = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if cut[2] - cut[0] < 1 or cut[3] - cut[1] < 1:
        raise ValueError(f"box {box!r}: less than a pixel of it lies in the image of {width} x {height} px")
    return cut


def widen(box: Box, size: tuple[int, int], margin: float) -> Box:
    """The square round a box's middle, its side 1 + 2 `margin` times the box's longer side, as far as it lies within an
    image of `size`; with margin 0 the part of the box itself. A square, because the model squashes what it is given
    to one, and a long box would lose its shape. Raises as `inside_image`."""
    x0, y0, x1, y1 = inside_image(box, size)
    if margin <= 0:
        return x0, y0, x1, y1
    half = (0.5 + margin) * max(x1 - x0, y1 - y0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return max(x - half, 0.0), max(y - half, 0.0), min(x + half, float(size[0])), min(y + half, float(size[1]))


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float | np.number) and math.isfinite(number)
