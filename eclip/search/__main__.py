"""`python -m eclip.search --index INDEX "red armchair"`: an index asked by words, by a photo or by both.

    eclip search --index INDEX --image photo.jpg --box 40,80,220,300 --html found.html

A table on stdout, or JSON; a page or a picture with the regions that matched.
"""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from eclip.dataloading.schema import Box
from eclip.dataloading.system.console import say
from eclip.files import CannotWrite, cannot_write
from eclip.presets import one_line_errors
from eclip.search.query import Answer, Filters, Query, Searcher
from eclip.search.report import format_answer, gather, write_page, write_sheet
from eclip.search.report.shown import asked_for


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask an index that eclip embed wrote: by words, by --image, or by both (the words say what of it is meant)."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What is looked for, "red armchair"."""
    index: str
    """A folder, or an address that LanceDB knows."""
    image: Path | None = None
    """A photo of what is looked for."""
    box: str | None = None
    """x0,y0,x1,y1 in pixels of the photo: the object that is meant."""
    category: str | None = None
    """Only of this category."""
    attribute: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE: only products with this attribute; several times."""
    source: str | None = None
    """Only images of this kind: detail, customer, ..."""
    price_min: float | None = None
    price_max: float | None = None
    limit: int = 10
    """Hits at most."""
    hybrid: bool = False
    """Ask the titles by full text too, and fuse both rankings (reciprocal rank fusion)."""
    rerank: int = 0
    """So many of the first hits in order with the help of the matching head; it seldom helps where titles are good."""
    all_images: bool = False
    """Every image is a hit of its own, instead of every product once."""
    locate: bool = False
    """Look for the words in the pictures found, instead of showing the region of each picture's own title."""
    json: bool = False
    """JSON on stdout."""
    html: Path | None = None
    """Write a page with pictures and regions, that needs no network."""
    png: Path | None = None
    """Write a picture of the hits with their regions."""
    model: Path | None = None
    """The model that made the index, where it is no longer at the place that the index names."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.search") -> None:
    """Search and print; exits with 2 for flags that mean nothing, with 1 for what cannot be answered."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog=prog, args=argv)
        query = read_query(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # titles may hold what the terminal has not
    try:
        searcher = Searcher.open(arguments.index, arguments.model, arguments.device)
        answer = searcher.search(query)
        # First what is asked for on stdout: a full disk costs no answer.
        say(json.dumps(answer.to_dict(), ensure_ascii=False, indent=2) if arguments.json else format_answer(answer))
        _write(arguments, searcher, query, answer)
    except torch.OutOfMemoryError:
        sys.exit(f"error: --device {arguments.device}: the GPU's memory does not suffice; use --device cpu")
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def read_query(arguments: Arguments) -> Query:
    """The question of some flags. Raises ValueError for one that means nothing."""
    if not arguments.index.strip():
        raise ValueError("--index is empty (a variable of the shell that is not set?): name the index to ask")
    return Query(
        words=" ".join(arguments.words) if arguments.words else None,
        image=arguments.image,
        box=None if arguments.box is None else read_box(arguments.box),
        filters=Filters(
            category=arguments.category,
            attributes=read_attributes(arguments.attribute),
            source=arguments.source,
            price_min=arguments.price_min,
            price_max=arguments.price_max,
        ),
        limit=arguments.limit,
        hybrid=arguments.hybrid,
        rerank=arguments.rerank,
        fold=not arguments.all_images,
        locate=arguments.locate,
    )


def read_box(text: str) -> Box:
    """"x0,y0,x1,y1" as a box. Raises ValueError."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--box {text!r}: four numbers are wanted, x0,y0,x1,y1 in pixels of the photo") from None
    return x0, y0, x1, y1


def read_attributes(texts: Sequence[str]) -> dict[str, str]:
    """"name=value" texts as a mapping. Raises ValueError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--attribute {text!r}: NAME=VALUE is wanted, as in --attribute colour=red")
        if found.setdefault(name, value) != value:
            raise ValueError(f"--attribute {name!r} is given twice, as {found[name]!r} and {value!r}: leave one out")
    return found


def _write(arguments: Arguments, searcher: Searcher, query: Query, answer: Answer) -> None:
    if arguments.html is None and arguments.png is None:
        return
    photo, hits = gather(searcher, query, answer)
    question = asked_for(query)
    if arguments.html is not None:
        with _flag("--html", arguments.html):
            write_page(arguments.html, question, f"scored by {answer.scored_by}", photo, hits)
        say(f"written: {arguments.html}", sys.stderr)
    if arguments.png is not None:
        with _flag("--png", arguments.png):
            note = write_sheet(arguments.png, question, photo, hits)
        say(f"written: {arguments.png}" + (f" ({note})" if note else ""), sys.stderr)


@contextmanager
def _flag(name: str, path: Path) -> Iterator[None]:
    """A file that cannot be written is said of its flag."""
    try:
        yield
    except CannotWrite as error:
        raise CannotWrite(cannot_write(path, error, flag=name)) from error


if __name__ == "__main__":
    main()
