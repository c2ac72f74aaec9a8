"""Pack a user's own catalogue, a table and a folder of images, into shards:

    python -m eclip.dataloading.pack --table catalog.csv --images photos --out data/shop --val 0.05 --test 0.05

The table is CSV or TSV with a header, or JSON lines; a product's rows need not stand together. Columns: `product`,
`title`, `category`, `image` (path below the image folder; several in a cell by `|`, `;`, `,`, blanks or as a list), and
when present `sku`, `source` (detail, customer, ad), `catalog`, `title_<language>`, `attribute_<name>`. Other names are
recognised (tables/columns.py) or told by --column; how the table was understood is printed before any image is decoded.

Every image is decoded in full, since one that cannot be decoded costs much more during training; what is left out is
counted and listed with its reason in `rejected.jsonl` (`rejected.refused.jsonl` when nothing was packed and an earlier
packing stays). EXIF orientation is baked in, colours become sRGB and the short side is reduced: a batch of 320 px
JPEGs is made 2.0 to 2.6 times as fast as one of 1 MP photos at 224 px, and they hold all that such crops can use.

All products of a catalog entry are in one split, by a hash of its id. New shards are written aside and take the place
of an earlier packing's together, when all are whole: until then both need space on the disk, and whatever stops a
packing, the earlier one stays. `packing.json` beside the shards records what they were packed from.
"""

import argparse
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import Rejection
from .images import MIN_SIDE, encode_image
from .packing import (
    RECORD,
    REFUSED,
    REJECTED,
    Draft,
    ImageFolder,
    Sample,
    check_shares,
    decoding_threads,
    gather,
    image_name,
    listed_tars,
    own,
    refuse_foreign,
    replace_shards,
    require_entries,
    split_of,
    to_sample,
    write_record,
    write_shards,
    write_tars,
)
from .system.command import Parser, one_line_errors
from .system.console import progress_bar, say
from .tables import NoImages, add_table_arguments, open_table, require_places, table_options

# Also what a program that writes its own shards needs.
__all__ = ["PackReport", "Refused", "encode_image", "image_name", "main", "pack_catalog", "write_shards"]


@dataclass
class PackReport:
    """What `pack_catalog` wrote and what it left out."""

    products: Counter[str] = field(default_factory=Counter)
    """By split."""
    images: int = 0
    rejected: list[Rejection] = field(default_factory=list)


class Refused(ValueError):
    """A packing that wrote no shards; its report tells what was rejected."""

    def __init__(self, message: str, report: PackReport):
        super().__init__(message)
        self.report = report


def pack_catalog(
    table: Path,
    images: Path,
    data_dir: Path,
    *,
    val: float = 0.0,
    test: float = 0.0,
    short_side: int = 320,
    quality: int = 90,
    follow_links: bool = False,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    separator: str | None = None,
    quotes: bool = True,
    workers: int = 4,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> PackReport:
    """Pack a catalogue (see the module's docstring) into `data_dir`, split by catalog id.

    val, test: shares of the catalog entries. follow_links: also images behind links that lead out of the folder.
    columns, encoding, separator, quotes: of the table, see `open_table`. workers: decoding threads. tell: gets the
    lines about the table, before any image is decoded. Writes `rejected.jsonl` when something was left out.

    Raises ValueError, and leaves the shards that were there: for settings, a table or a folder that cannot be used,
    while another packing is at work there, when the tars there are somebody else's or the disk is full; and Refused
    when a split would be empty. Its reasons are in `rejected.jsonl`, beside older shards in `rejected.refused.jsonl`.
    """
    check_shares(val, test)
    ranges = {"short_side": (short_side, MIN_SIDE, 65_500), "quality": (quality, 1, 95), "workers": (workers, 1, 256)}
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name}={value}: expected {low} to {high}")
    require_places(table, images)
    place = os.stat(images)
    folder = ImageFolder(folder=images, follow_links=follow_links, short_side=short_side, quality=quality)
    report = PackReport()
    with own(data_dir, wait=False):
        refuse_foreign(data_dir)
        try:
            opened = open_table(table, images, columns=columns, encoding=encoding, separator=separator, quotes=quotes)
        except NoImages as error:
            report.rejected += [found for name in error.names if isinstance(found := folder.encode(name), Rejection)]
            raise Refused(f"{error}{_keep_reasons(data_dir, report.rejected)}", report) from error
        if tell is not None:
            for line in opened.summary():
                tell(line)
        drafts = gather(opened.rows(report.rejected), table.name, report.rejected)
        facts: dict[str, Any] = {"table": table.name, "table_sha256": _digest(table), "val": val, "test": test}
        facts |= {"short_side": short_side, "quality": quality, "follow_links": follow_links}
        try:
            if not drafts:
                raise ValueError("no product left")
            require_entries((draft.product.catalog for draft in drafts), val, test)
            with (
                replace_shards(data_dir) as aside,
                progress_bar(len(drafts), unit="product", desc="packing", disable=not progress) as bar,
            ):
                _write(drafts, folder, aside, report, bar, val=val, test=test, workers=workers)
                if not (images.is_dir() and os.path.samestat(place, os.stat(images))):  # its images were not at fault
                    raise ValueError(f"{images} is gone, or another folder, since packing began; is its store mounted?")
                if report.rejected:
                    _list(report.rejected, aside / REJECTED)
                write_record(aside, RECORD, {**facts, "products": report.products, "images": report.images})
        except ValueError as error:
            where = "" if isinstance(error.__cause__, OSError) else f"{table}: "  # the disk's fault, or the table's
            raise Refused(f"{where}{error}{_keep_reasons(data_dir, report.rejected)}", report) from error
    return report


def _write(
    drafts: Sequence[Draft],
    folder: ImageFolder,
    aside: Path,
    report: PackReport,
    bar: "tqdm[None]",
    *,
    val: float,
    test: float,
    workers: int,
) -> None:
    with decoding_threads(workers) as pool:

        def samples(split: str, mine: Sequence[Draft]) -> Iterator[Sample]:
            items = ((draft, draft.paths) for draft in mine)
            for draft, encoded in folder.encode_all(items, pool, ahead=4 * workers):
                bar.update()
                sample = to_sample(draft, encoded, report.rejected)
                if sample is not None:
                    report.products[split] += 1
                    report.images += len(sample[1])
                    yield sample
            if not report.products[split]:
                raise ValueError(f"no product left for split {split}: none of its {len(mine)} has a usable image")

        for split, share in (("train", 1.0), ("val", val), ("test", test)):
            if share > 0:
                mine = [draft for draft in drafts if split_of(draft.product.catalog, val, test) == split]
                write_tars(samples(split, mine), aside, split)


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


# JSON may hold them plainly, but who reads a file by str.splitlines() would end a line there.
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def _list(rejected: Sequence[Rejection], path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # a lone surrogate as JSON escapes it
        for rejection in rejected:
            file.write(json.dumps(asdict(rejection), ensure_ascii=False).translate(_LINE_ENDS) + "\n")


def _keep_reasons(data_dir: Path, rejected: Sequence[Rejection]) -> str:
    """List what a refused packing left out, and say where."""
    if not rejected:
        return ""
    path = data_dir / (REFUSED if listed_tars(data_dir) else REJECTED)
    part = path.with_name(f"{path.name}.part")
    try:
        _list(rejected, part)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        return f" ({len(rejected)} rejected; {path.name} could not be written: {error.strerror or error})"
    return f" ({len(rejected)} rejected, with their reasons in {path})"


def _counted(rejected: Sequence[Rejection]) -> list[str]:
    """A line for each kind and reason, the most frequent first, with its first case as an example."""
    groups: dict[tuple[str, str], list[Rejection]] = {}
    for rejection in rejected:
        groups.setdefault((rejection.kind, rejection.reason), []).append(rejection)
    lines = []
    for (kind, reason), cases in sorted(groups.items(), key=lambda group: -len(group[1])):
        detail = f": {cases[0].detail}" if cases[0].detail else ""
        lines.append(f"  {len(cases)} x {reason} ({kind}; e.g. {cases[0].where}{detail})")
    return lines


def _summary(report: PackReport) -> str:
    counts = ", ".join(f"{split} {n}" for split, n in report.products.items())
    kinds = Counter(rejection.kind for rejection in report.rejected)
    rejected = ", ".join(f"{kinds[kind]} {kind}{'s' * (kinds[kind] != 1)}" for kind in ("row", "image", "product"))
    return f"products {counts}; {report.images} images; {len(report.rejected)} rejected ({rejected})"


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.dataloading.pack") -> None:
    """Command line of `pack_catalog`."""
    parser = Parser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", type=Path, required=True, help="one row an image or a product, in CSV or JSON lines")
    add("--images", type=Path, required=True, help="folder the table's image paths start from")
    add("--out", type=Path, required=True, help="folder of the shards; those of an earlier packing are replaced")
    add("--val", type=float, default=0.0, help="share of the catalog entries for val (default: %(default)s)")
    add("--test", type=float, default=0.0, help="share of the catalog entries for test (default: %(default)s)")
    add("--short-side", type=int, default=320, help="largest short side, pixels (default: %(default)s)")
    add("--quality", type=int, default=90, help="JPEG quality (default: %(default)s)")
    add_table_arguments(parser)
    add("--follow-links", action="store_true", help="also use images behind links that lead out of --images")
    add("--workers", type=int, default=4, help="decoding threads (default: %(default)s)")
    add("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        try:
            report = pack_catalog(
                args.table,
                args.images,
                args.out,
                val=args.val,
                test=args.test,
                short_side=args.short_side,
                quality=args.quality,
                follow_links=args.follow_links,
                **table_options(args),
                workers=args.workers,
                progress=not args.no_progress,
                tell=say,
            )
        except Refused as refused:
            for line in _counted(refused.report.rejected):
                say(line)
            raise
        say(f"{args.out}: {_summary(report)}")
        for line in _counted(report.rejected):
            say(line)


if __name__ == "__main__":
    main()
