"""An answer as one HTML file: pictures within it, nothing fetched, every text escaped."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from eclip.files import replace_text
from eclip.search.report.shown import Shown

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.25rem } p { color: #555 }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; padding: 0 }
ol { list-style: none }
figure { margin: 0 } figcaption { overflow-wrap: anywhere } small { color: #666; display: block }
.picture { position: relative; display: inline-block; line-height: 0 } img { max-width: 100%; border-radius: 4px }
.box { position: absolute; box-sizing: border-box; border: 2px solid #d6001c; box-shadow: 0 0 0 1px #fff }
.asked { border-color: #0a7a2f; border-style: dashed }
"""
_HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
    '<meta http-equiv="Content-Security-Policy" content="'
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)


def write_page(path: Path, question: str, note: str, photo: Shown | None, hits: Sequence[Shown]) -> None:
    """Write the file. question: a line above the hits; note: one below it. Raises CannotWrite."""
    title = escape(question)
    parts = [f"{_HEAD}\n<title>{title}</title><style>{_STYLE}</style></head><body>", f"<h1>{title}</h1>"]
    parts += [f"<p>{escape(note)}</p>"] + ([] if photo is None else [_figure(photo, "")])
    parts += ["<ol>", *(f"<li>{_figure(hit, f'{rank}. ')}</li>" for rank, hit in enumerate(hits, start=1)), "</ol>"]
    if not hits:
        parts.append("<p>No hits.</p>")
    replace_text(path, "\n".join([*parts, "</body></html>\n"]))


def _figure(shown: Shown, rank: str) -> str:
    source = base64.b64encode(shown.jpeg).decode("ascii")
    boxes = "".join(_box(kind, *box) for kind, box in shown.boxes)
    title = escape(shown.title)
    return (
        f'<figure><div class="picture"><img src="data:image/jpeg;base64,{source}" alt="{title}">{boxes}</div>'
        f'<figcaption>{rank}<bdi>{title}</bdi><small>{escape(shown.details)}</small></figcaption></figure>'
    )


def _box(kind: str, x0: float, y0: float, x1: float, y1: float) -> str:
    style = f"left:{100 * x0:.2f}%;top:{100 * y0:.2f}%;width:{100 * (x1 - x0):.2f}%;height:{100 * (y1 - y0):.2f}%"
    return f'<div class="box {kind}" title="{kind}" style="{style}"></div>'
