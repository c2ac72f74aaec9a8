"""A user's table of products: opened with every check that can fail before work, then read row by row.

    table = open_table(Path("catalog.csv"), Path("photos"))
    print(*table.summary(), sep="\\n")
    for row in table.rows(rejected): ...

CSV (separated by commas, semicolons, tabs or pipes) and JSON lines, in UTF-8, UTF-16 with its mark, or as told; columns
by their names or aliases (table_columns.py). The file is read twice and never held: once to count and check it, then
for the rows.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .rejection import Rejection
from .schema import SOURCES
from .table_columns import Columns, Mapper, check_fields, compact, is_known, parse_columns
from .table_images import ImageNames, explain_absence
from .table_records import SEPARATORS, CsvSource, JsonSource, Record, open_csv
from .table_text import open_text
from .table_values import BadCell, clean, clean_attribute, clean_id, strip

DELIMITED = (".csv", ".tsv", ".tab", ".txt")
JSON_LINES = (".jsonl", ".ndjson", ".json")

_SAMPLE = 1000
_LONG = 1 << 16  # characters of a cell that the sample keeps
_MOST_COLUMNS = 10_000
_WAYS_OUT = {
    ".xlsx": "save the sheet as 'CSV UTF-8'",
    ".xls": "save the sheet as 'CSV UTF-8'",
    ".ods": "save the sheet as CSV in UTF-8",
    ".parquet": 'convert it: python -c "import pandas; pandas.read_parquet(IN).to_csv(OUT, index=False)"',
    ".feather": 'convert it: python -c "import pandas; pandas.read_feather(IN).to_csv(OUT, index=False)"',
    ".gz": "unpack it: gunzip",
    ".zip": "unpack it: unzip",
    ".bz2": "unpack it: bunzip2",
    ".zst": "unpack it: unzstd",
    ".xz": "unpack it: unxz",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One usable row, its texts cleaned: one line each, none of the required ones empty."""

    number: int
    """Of the data row, from 1, blank lines not counted."""
    product: str
    title: str
    category: str
    images: tuple[str, ...]
    """Paths below the image folder, at least one."""
    sku: str
    source: str
    catalog: str
    titles: dict[str, str]
    """By language."""
    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What the first reading of a table found."""

    rows: int
    names: tuple[str, ...]
    """Of the columns, or all keys of JSON lines."""
    sample: tuple[dict[str, Any], ...]
    """Usable rows spread evenly over the table, with the columns that may be used."""

    @property
    def filled(self) -> set[str]:
        """Columns with a cell in the sample that is not empty."""
        return {name for cells in self.sample for name, cell in cells.items() if not _empty(cell)}


class Table:
    """An opened table; made by `open_table`."""

    def __init__(
        self,
        source: CsvSource | JsonSource,
        count: int,
        columns: Columns,
        images: ImageNames,
        *,
        found: int,
        looked_up: int,
    ) -> None:
        self.name = source.text.path.name
        self.count = count
        self.columns = columns
        self._source, self._images = source, images
        self._found, self._looked_up = found, looked_up

    def summary(self) -> list[str]:
        """How the table was understood, in lines to print before any work."""
        kind = f"{self._source.describe()}, encoding {self._source.text.named}"
        found = f"{self._found} of {self._looked_up} looked up are below {self._images.folder}"
        return [
            f"{self.name}: {self.count} row{'s' * (self.count != 1)}, {kind}",
            f"  columns: {self.columns.describe()}",
            *(f"  {note}" for note in self.columns.notes),
            f"  images: {self._images.describe()}; {found}",
        ]

    def rows(self, rejected: list[Rejection]) -> Iterator[Row]:
        """The usable rows; the others are appended to `rejected` by number. Raises ValueError when the file changed.

        A row with neither title nor category right after one of the same product, as Shopify writes its further
        images, has those of the row before.
        """
        before: Row | None = None
        for number, record in enumerate(self._source.records(self.columns.used), start=1):
            try:
                if record.fault:
                    raise BadCell(record.fault, record.detail)
                before = self._row(number, record.cells, before)
            except BadCell as bad:
                where, detail = (
                    f"{self.name}, row {number}",
                    f"line {record.line}" + f": {bad.detail}" * bool(bad.detail),
                )
                rejected.append(Rejection(kind="row", where=where, reason=bad.reason, detail=detail))
                continue
            yield before

    def _row(self, number: int, cells: Mapping[str, Any], before: Row | None) -> Row:
        fields, columns = self.columns.fields, self.columns

        def cell(name: str) -> Any:
            return cells.get(fields[name]) if name in fields else None

        own_id = cells.get(columns.own_id)
        grouped = not columns.own_id or clean(cell("product"), "product")
        product = clean_id(cell("product") if grouped else own_id, "product")
        raw_title, raw_category = cell("title"), cell("category") if "category" in fields else "all"
        if (
            before
            and before.product == product
            and _empty(raw_title)
            and (_empty(raw_category) or "category" not in fields)
        ):
            raw_title, raw_category = before.title, before.category
        title = clean(raw_title, "title", required=True)
        category = clean(raw_category, "category", required=True)
        images = tuple(name for column in columns.images for name in self._images.names(cells.get(column)))
        for name, value in (("product", product), ("title", title), ("category", category), ("image", images)):
            if not value:
                raise BadCell(f"no {name}")
        source = clean(cell("source"), "source").lower() or "detail"
        if source not in SOURCES:
            raise BadCell(f"unknown source (known: {', '.join(SOURCES)})", source)
        titles = {key: clean(cells.get(name), f"title_{key}") for key, name in columns.titles.items()}
        attributes = {k: clean_attribute(cells.get(name), f"attribute_{k}") for k, name in columns.attributes.items()}
        return Row(
            number=number,
            product=product,
            title=title,
            category=category,
            images=tuple(dict.fromkeys(images)),
            sku=clean(cell("sku"), "sku") or product,
            source=source,
            catalog=clean(cell("catalog"), "catalog") or product,
            titles={key: text for key, text in titles.items() if text},
            attributes={key: value for key, value in attributes.items() if value is not None},
        )


def open_table(
    path: Path,
    images: Path,
    *,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    separator: str | None = None,
    quotes: bool = True,
) -> Table:
    """Open a table of images below the folder `images`.

    columns: the column's name by field, beyond the aliases; "" leaves an optional field out. separator: one character
    or a name of SEPARATORS, found out by default. quotes: whether '"' quotes cells; else it is a letter.

    Raises ValueError, in one line with the way out, when the file cannot be read as a table in full, a required
    column is not found, or none of the images looked up is there.
    """
    columns = columns or {}
    check_fields(columns)
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder of images")
    source = _open(path, columns, encoding, separator, quotes)
    scan = _scan(source, columns)
    mapper = Mapper(str(path), scan.names, scan.filled, columns)
    look = _look_up(mapper, scan, images)
    mapping = mapper.columns(look.columns)
    return Table(source, scan.rows, mapping, look.reader, found=look.found, looked_up=len(look.names))


def _open(
    path: Path, columns: Mapping[str, str], encoding: str | None, separator: str | None, quotes: bool
) -> CsvSource | JsonSource:
    kind = path.suffix.lower()
    if kind not in DELIMITED + JSON_LINES:
        way_out = _WAYS_OUT.get(kind, "save the table as CSV in UTF-8")
        kinds = ", ".join(DELIMITED + JSON_LINES[:-1])
        raise ValueError(f"{path}: expected a table ending in {kinds} or {JSON_LINES[-1]} (JSON lines); {way_out}")
    text = open_text(path, encoding)
    if kind in JSON_LINES:
        if separator is not None or not quotes:
            raise ValueError(f"{path}: --separator and --no-quotes are for delimited tables, not for JSON lines")
        return JsonSource(text)
    given = set(columns.values())

    def known(names: Collection[str]) -> int:
        return len({name for name in names if is_known(name) or name in given})

    letter = None if separator is None else _separator(separator)
    return open_csv(text, separator=letter, quotes=quotes, tabs=kind in (".tsv", ".tab"), known=known)


def _separator(given: str) -> str:
    letter = "\t" if given == "\\t" else SEPARATORS.get(given.lower(), given)
    if len(letter) != 1 or letter in '"\r\n\0' or letter.isalnum():
        names = ", ".join(SEPARATORS)
        raise ValueError(f"--separator {given!r}: expected {names}, or one character that is no letter, digit or quote")
    return letter


def _scan(source: CsvSource | JsonSource, columns: Mapping[str, str]) -> Scan:
    """Read the whole table once: what is broken is found now."""
    names = dict.fromkeys(source.columns or ())
    sample: list[dict[str, Any]] = []
    rows = uneven = 0
    first_uneven: Record | None = None
    stride = 1
    told = {compact(name) for name in columns.values()}

    @cache
    def looked_at(name: str) -> bool:
        return is_known(name) or compact(name) in told

    for record in source.records():
        rows += 1
        if record.fault:
            if "than the header" in record.fault:
                uneven += 1
                first_uneven = first_uneven or record
            continue
        if len(names) < _MOST_COLUMNS:
            names.update(dict.fromkeys(record.cells))
        if rows % stride == 0:
            sample.append({name: _short(cell) for name, cell in record.cells.items() if looked_at(name)})
        if len(sample) > 2 * _SAMPLE:
            sample, stride = sample[1::2], stride * 2
    path = source.text.path
    if not rows:
        raise ValueError(f"{path}: a header and no rows; there is nothing to pack")
    if first_uneven and uneven * 2 > rows:
        raise ValueError(
            f"{path}: {uneven} of {rows} rows have {first_uneven.fault} (line {first_uneven.line}: "
            f"{first_uneven.detail}); found {source.describe()}: give another --separator, or mend the rows"
        )
    return Scan(rows=rows, names=tuple(names), sample=tuple(sample))


@dataclass(frozen=True)
class _Look:
    """Columns of images, how their cells are read, the names in the sample and how many of these are there."""

    columns: list[str]
    reader: ImageNames
    names: list[str]
    found: int


def _look(scan: Scan, folder: Path, columns: list[str]) -> _Look:
    cells = [row[name] for row in scan.sample for name in columns if name in row]
    reader = ImageNames(folder)
    reader.learn(cells)
    names = [name for cell in cells for name in _names(reader, cell)]
    return _Look(columns, reader, names, sum(map(reader.exists, names)))


def _look_up(mapper: Mapper, scan: Scan, folder: Path) -> _Look:
    """The first candidates for columns of images whose files are there, with further columns of which that is true."""
    looks: list[_Look] = []
    for columns in mapper.image_candidates():
        looks.append(_look(scan, folder, columns))
        if looks[-1].found:
            others = [name for name in mapper.further_images() if name not in columns]
            more = [name for name in others if _look(scan, folder, [name]).found]
            return _look(scan, folder, [*columns, *more]) if more else looks[-1]
    named = next((look for look in looks if look.names), None)
    if named:
        raise ValueError(f"{mapper.table}: {explain_absence(folder, named.names, named.columns[0])}")
    return looks[0] if looks else _Look([], ImageNames(folder), [], 0)


def _names(reader: ImageNames, cell: Any) -> list[str]:
    try:
        return reader.names(cell)
    except BadCell:  # its row will be rejected
        return []


def _short(cell: Any) -> Any:
    return cell[:_LONG] if isinstance(cell, str) else cell


def _empty(cell: Any) -> bool:
    return cell is None or cell == [] or (isinstance(cell, str) and not strip(cell))


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `open_table`; `table_options` reads them."""
    add = parser.add_argument
    add(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the table's column NAME is FIELD (product, title, category, image, sku, source, catalog, "
        "title_<language>, attribute_<name>); several times; FIELD= leaves an optional one out",
    )
    add("--encoding", help="of the table, such as cp1252 (default: by its byte order mark, else UTF-8)")
    add("--separator", help="comma, semicolon, tab, pipe or another character (default: found out)")
    add("--no-quotes", action="store_true", help="the table's cells are never quoted: '\"' is a letter")


def table_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `open_table` that the flags give. Raises ValueError."""
    return {
        "columns": parse_columns(args.column),
        "encoding": args.encoding,
        "separator": args.separator,
        "quotes": not args.no_quotes,
    }
