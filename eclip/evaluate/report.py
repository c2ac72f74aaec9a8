"""What a reader sees: plain-text tables and a sheet of grounding overlays."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont


@dataclass(kw_only=True)
class Table:
    """One task's numbers: rows of metrics; a row may lack a metric that it has no meaning for."""

    title: str
    rows: dict[str, dict[str, float]]
    counts: dict[str, int] = field(default_factory=dict)
    """What was counted: queries, gallery, classes, ..."""
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Choices made outside the test split, such as thresholds."""
    unit: Literal["share", "nats"] = "share"
    """share: every metric lies in [0, 1], and is shown in %."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def format_table(table: Table) -> str:
    """The table as text: title with counts, one line a row, percentages with one decimal (nats with two)."""
    counts = ", ".join(f"{value} {name}" for name, value in table.counts.items())
    head = f"{table.title} ({counts})" if counts else table.title
    columns = list(dict.fromkeys(name for row in table.rows.values() for name in row))
    first = max([len(name) for name in table.rows] + [24])
    widths = [max(len(name), 6) for name in columns]
    lines = [head, " " * first + "".join(f"  {name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for name, row in table.rows.items():
        cells = (_format(row[c], table.unit) if c in row else "" for c in columns)
        lines.append(f"{name:<{first}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines + textwrap.wrap(table.note, 110, initial_indent="  ", subsequent_indent="  "))


def _format(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit == "nats" else f"{100 * value:.1f}"


@dataclass(kw_only=True)
class Overlay:
    """One image of the sheet. Boxes are in pixels of the square image; maps are (S, S) in [0, 1]."""

    image: NDArray[np.uint8]
    """(S, S, 3)."""
    title: str
    truth: NDArray[np.float64]
    maps: Mapping[str, NDArray[np.float64]]
    boxes: Mapping[str, NDArray[np.float64]]


def draw_sheet(overlays: Sequence[Overlay], path: Path, *, columns: int = 2, side: int = 160) -> None:
    """Write a PNG: for each overlay the image with the true box (green), then each map with its box (red)."""
    panels = 1 + max(len(o.maps) for o in overlays)
    gap, caption = 6, 30
    cell = (panels * (side + gap) + gap, side + caption + gap)
    lines = -(-len(overlays) // columns)
    sheet = Image.new("RGB", (columns * cell[0], lines * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for place, overlay in enumerate(overlays):
        left, top = place % columns * cell[0] + gap, place // columns * cell[1] + caption
        scale = side / overlay.image.shape[0]
        draw.text((left, top - caption + 2), textwrap.shorten(overlay.title, 90, placeholder=" ..."), "black", font)
        for panel, name in enumerate(["image and true box", *overlay.maps]):
            pixels = overlay.image if panel == 0 else _blend(overlay.image, overlay.maps[name])
            x = left + panel * (side + gap)
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR), (x, top))
            draw.text((x, top - 14), name, "dimgray", font)
            _rectangle(draw, overlay.truth * scale, x, top, "lime")
            if panel:
                _rectangle(draw, overlay.boxes[name] * scale, x, top, "red")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _blend(image: NDArray[np.uint8], scores: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The image in grey, tinted from blue (0) over green to red (1) by the map."""
    ramp = np.clip(1.5 - np.abs(4 * scores[..., None] - np.array([3.0, 2.0, 1.0])), 0, 1) * 255
    grey = image.mean(-1, keepdims=True)
    return (0.5 * grey + 0.5 * ramp).astype(np.uint8)


def _rectangle(draw: ImageDraw.ImageDraw, box: NDArray[np.float64], x: int, y: int, colour: str) -> None:
    x0, y0, x1, y1 = (float(v) for v in box)
    draw.rectangle((x + x0, y + y0, x + max(x1 - 1, x0), y + max(y1 - 1, y0)), outline=colour, width=2)
