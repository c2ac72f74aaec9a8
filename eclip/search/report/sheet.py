"""An answer as a picture: the photo that was asked with and the hits in rows, their boxes drawn."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from eclip.evaluate.report.lettering import Lettering
from eclip.evaluate.report.png import write_png
from eclip.search.report.shown import Shown

_SIDE, _GAP, _LINE, _LETTERS, _COLUMNS = 220, 12, 16, 12, 5  # pixels; pictures in a row
_COLOURS = {"matched": "#d6001c", "asked": "#0a7a2f"}


def write_sheet(path: Path, question: str, photo: Shown | None, hits: Sequence[Shown]) -> str:
    """Write a PNG. Returns what is to be said about letters that no font has, "" when there are none.

    Raises CannotWrite.
    """
    named = [(f"{rank}. {hit.title}", hit) for rank, hit in enumerate(hits, start=1)]
    cells = ([] if photo is None else [(photo.title, photo)]) + named
    lettering = Lettering([question, *(t for title, shown in cells for t in (title, shown.details))], _LETTERS)
    columns = max(1, min(_COLUMNS, len(cells)))
    height = _SIDE + 2 * _LINE + _GAP
    size = (max(columns * (_SIDE + _GAP) + _GAP, 3 * _SIDE), -(-len(cells) // columns) * height + 2 * _LINE + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    lettering.draw(draw, (_GAP, _LINE + 2), question if hits else f"{question}: no hits", "black", size[0] - 2 * _GAP)
    for place, (title, shown) in enumerate(cells):
        x, y = place % columns * (_SIDE + _GAP) + _GAP, place // columns * height + 2 * _LINE
        _paste(sheet, draw, shown, x, y)
        lettering.draw(draw, (x, y + _SIDE + _LINE - 2), title, "black", _SIDE)
        lettering.draw(draw, (x, y + _SIDE + 2 * _LINE - 2), shown.details, "dimgray", _SIDE)
    write_png(path, sheet)
    return lettering.note()


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, shown: Shown, x: int, y: int) -> None:
    with Image.open(io.BytesIO(shown.jpeg)) as opened:
        picture = opened.convert("RGB")
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    x, y = x + (_SIDE - width) // 2, y + _SIDE - height
    sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
    for kind, (x0, y0, x1, y1) in shown.boxes:
        corners = (x + x0 * width, y + y0 * height, x + max(x1 * width - 1, 0), y + max(y1 * height - 1, 0))
        draw.rectangle(_ordered(corners), outline=_COLOURS[kind], width=2)


def _ordered(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    return x0, y0, max(x0, x1), max(y0, y1)
