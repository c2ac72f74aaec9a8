"""A picture of grounding overlays: what a reader looks at beside the tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from eclip.evaluate.report.lettering import Lettering
from eclip.evaluate.report.png import write_png

_GAP, _CAPTION, _LETTERS = 6, 30, 11  # pixels


@dataclass(kw_only=True)
class Overlay:
    """One image of the sheet. Boxes are in pixels of the square image; maps are (S, S) in [0, 1]."""

    image: NDArray[np.uint8]
    """(S, S, 3)."""
    title: str
    truth: NDArray[np.float64]
    maps: Mapping[str, NDArray[np.float64]]
    boxes: Mapping[str, NDArray[np.float64]]


def draw_sheet(
    overlays: Sequence[Overlay], path: Path, *, columns: int = 2, side: int = 160, fonts: Sequence[Path] | None = None
) -> str:
    """Write a PNG: for each overlay the image with the true box (green), then each map with its box (red).

    fonts: see Lettering. Returns what is to be said about letters that no font has, "" when there are none; the picture
    says it too. Raises CannotWrite.
    """
    panels = 1 + max(len(o.maps) for o in overlays)
    width, height = panels * (side + _GAP) + _GAP, side + _CAPTION + _GAP
    lettering = Lettering([o.title for o in overlays], _LETTERS, fonts=fonts)
    note = lettering.note()
    lines = -(-len(overlays) // columns)
    sheet = Image.new("RGB", (columns * width, lines * height + (_CAPTION // 2 if note else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, overlay in enumerate(overlays):
        left, top = place % columns * width + _GAP, place // columns * height + _CAPTION
        scale = side / overlay.image.shape[0]
        lettering.draw(draw, (left, top - _CAPTION + 12), overlay.title, "black", width - 2 * _GAP)
        for panel, name in enumerate(["image and true box", *overlay.maps]):
            pixels = overlay.image if panel == 0 else _blend(overlay.image, overlay.maps[name])
            x = left + panel * (side + _GAP)
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR), (x, top))
            draw.text((x, top - 14), name, "dimgray", lettering.faces[0].font)
            _rectangle(draw, overlay.truth * scale, x, top, "lime")
            if panel:
                _rectangle(draw, overlay.boxes[name] * scale, x, top, "red")
    if note:
        lettering.draw(draw, (_GAP, sheet.height - _GAP), note, "firebrick", sheet.width - 2 * _GAP)
    write_png(path, sheet)
    return note


def _blend(image: NDArray[np.uint8], scores: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The image in grey, tinted from blue (0) over green to red (1) by the map."""
    ramp = np.clip(1.5 - np.abs(4 * scores[..., None] - np.array([3.0, 2.0, 1.0])), 0, 1) * 255
    grey = image.mean(-1, keepdims=True)
    return (0.5 * grey + 0.5 * ramp).astype(np.uint8)


def _rectangle(draw: ImageDraw.ImageDraw, box: NDArray[np.float64], x: int, y: int, colour: str) -> None:
    x0, y0, x1, y1 = (float(v) for v in box)
    draw.rectangle((x + x0, y + y0, x + max(x1 - 1, x0), y + max(y1 - 1, y0)), outline=colour, width=2)
