"""`python -m eclip.search.embed --model RUN --data SHARDS --out INDEX`: a searchable index of a catalogue.

Under ranks: `torchrun --nproc_per_node=N -m eclip embed ...`. Stopped or killed, the same command goes on.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import eclip
from eclip.dataloading.system.console import say
from eclip.dataloading.tables.columns import parse_columns
from eclip.parallel.ending import conclude, leave, once
from eclip.parallel.ranks import Ranks, find_ranks, start_ranks
from eclip.parallel.signals import StopSignals
from eclip.parallel.torchrun import has_launcher
from eclip.presets import one_line_errors
from eclip.search.embed.catalogue import Catalogue, ShardCatalogue, TableCatalogue
from eclip.search.embed.indexes import Kind
from eclip.search.embed.run import Report, Settings, VectorKind, embed_catalogue
from eclip.search.embed.store import Place

_SHOWN = 5
_TOLD = (ValueError, OSError, torch.OutOfMemoryError)
_GOES_ON = "the same command goes on with what is done"
_STOPPED = f"stopped; {_GOES_ON}"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Embed a catalogue into an index that `eclip search` and `eclip serve` open: a LanceDB table of its images."""

    model: Path
    """Folder of a trained run (--run-dir) or of an exported model."""
    data: Path | None = None
    """Folder of packed shards."""
    split: tuple[str, ...] = ()
    """Splits of the shards; all of them by default."""
    table: Path | None = None
    """Instead of shards: a table of products, as eclip pack reads it. Nothing is packed."""
    images: Path | None = None
    """Folder that the table's image paths start from."""
    out: str
    """The index: a folder, or the address of a LanceDB database (s3://, gs://, az://, db://)."""
    parquet: Path | None = None
    """Keep the rows as Parquet files in this folder, too, vectors in float32. An address as --out needs it."""
    overwrite: bool = False
    """Replace an index of other data, model or settings, when the new one is complete; drop unfinished work."""
    index: Kind = "auto"
    """Of the vectors; auto: flat (every vector is looked at) up to 50,000 rows, above IVF_PQ."""
    dim: int | None = None
    """Keep so many numbers of each vector, by a cut or a learnt rotation, whichever loses less."""
    vectors: VectorKind = "float32"
    """How vectors are kept. int8: in float16, searched through an index of one byte a number (from 256 rows on)."""
    facets: tuple[str, ...] = ()
    """Attributes to filter by; by default those that take few values."""
    thumbnail: int = 256
    """Longer side of the pictures in the index, pixels."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one. Ranks have one each."""
    workers: int = 2
    """Threads that decode images, of each rank."""
    column: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=NAME: the table's column NAME is FIELD, as in eclip pack; several times."""
    encoding: str | None = None
    """Of the table, such as cp1252."""
    separator: str | None = None
    """Of the table: comma, semicolon, tab, pipe or another character."""
    no_quotes: bool = False
    """The table's cells are never quoted."""
    follow_links: bool = False
    """Also use images behind links that lead out of --images."""
    rank_timeout_seconds: float = 600.0
    """A rank without a sign of life for so long counts as lost."""
    quiet: bool = False
    """No progress bar, no lines but the last."""


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.search.embed") -> int:
    """Returns the exit status: 0, 1 for an error, 128 + N after signal N."""
    arguments = once(lambda: _parse(argv, prog))
    watch = None
    with StopSignals(repeated_by_launcher=has_launcher()) as stop:
        try:
            watch = find_ranks(timeout=arguments.rank_timeout_seconds, stop=stop)
            ranks = start_ranks(watch)
            report = _embed(arguments, ranks)
        except BaseException as error:
            with stop.noted():
                return conclude(error, watch, stop, told=_TOLD, stopped=_STOPPED, goes_on=_GOES_ON)
    if report is not None:
        for line in describe(report, arguments.out, ranks.world_size):
            say(line)
    return 0


def _parse(argv: Sequence[str] | None, prog: str) -> Arguments:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog=prog, args=argv)
        _check(arguments)
    return arguments


def _check(arguments: Arguments) -> None:
    """Raise ValueError for flags that do not go together."""
    a = arguments
    if not a.out.strip():
        raise ValueError("--out: its value is empty (a variable of the shell that is not set?)")
    if (a.data is None) == (a.table is None):
        raise ValueError("give --data SHARDS, or --table TABLE and --images FOLDER: one of the two")
    if (a.table is None) != (a.images is None):
        raise ValueError("--table and --images go together: a table, and the folder that its image paths start from")
    if a.table is not None and a.split:
        raise ValueError("--split: a table has no splits; it belongs to --data")
    if a.table is None and (a.column or a.encoding or a.separator or a.no_quotes or a.follow_links):
        raise ValueError("--column, --encoding, --separator, --no-quotes and --follow-links belong to --table")


def _catalogue(arguments: Arguments, ranks: Ranks) -> Catalogue:
    if arguments.data is not None:
        return ShardCatalogue(arguments.data, arguments.split)
    assert arguments.table is not None and arguments.images is not None
    found = TableCatalogue(
        arguments.table,
        arguments.images,
        follow_links=arguments.follow_links,
        columns=parse_columns(arguments.column),
        encoding=arguments.encoding,
        separator=arguments.separator,
        quotes=not arguments.no_quotes,
    )
    if ranks.is_main and not arguments.quiet:
        for line in found.summary:
            say(line)
    return found


def _embed(arguments: Arguments, ranks: Ranks) -> Report | None:
    a = arguments
    settings = Settings(
        out=a.out,
        parquet=a.parquet,
        overwrite=a.overwrite,
        thumbnail=a.thumbnail,
        dim=a.dim,
        vectors=a.vectors,
        index=a.index,
        facets=a.facets,
        workers=a.workers,
        progress=not a.quiet,
    )
    device = str(ranks.device) if ranks.world_size > 1 and a.device == "auto" else a.device
    model = eclip.load(a.model, device)
    catalogue = _catalogue(a, ranks)
    report = embed_catalogue(model, catalogue, settings, ranks)
    if ranks.is_main and catalogue.rejected:
        reasons = Counter(rejection.reason for rejection in catalogue.rejected)
        first = {rejection.reason: rejection.where for rejection in reversed(catalogue.rejected)}
        for reason, times in reasons.most_common():
            say(f"  {times} x {reason} (row; e.g. {first[reason]})")
    return report


def describe(report: Report, out: str, world_size: int) -> list[str]:
    """What to print at the end."""
    record = report.record
    size = f"{record['rows']} images of {record['products']} products"
    if not report.new:
        return [f"{out}: complete, nothing to do ({size}, {record['created']}); --overwrite makes it anew"]
    lines = []
    if report.rejected:
        shown = "; ".join(f"{name}: {reason}" for name, reason in report.rejected[:_SHOWN])
        more = "; ..." if len(report.rejected) > _SHOWN else ""
        lines.append(f"  {len(report.rejected)} images left out: {shown}{more}")
    speed = ""
    if report.embedded:
        rate = report.embedded / max(report.seconds, 1e-9)
        speed = f"; {rate:.1f} images/s" + (" a rank" if world_size > 1 else "")
    kind = record["index"]["kind"]
    place = out if Place(out).is_address else os.path.normpath(out)
    lines.append(f"{place}: {size}, {record['dim']} numbers a vector in {record['vectors']}, index {kind}{speed}")
    return lines


if __name__ == "__main__":
    leave(main())
