"""A user's table of products: opened with every check that can fail before work, then read row by row.

    table = open_table(Path("catalog.csv"), Path("photos"))
    print(*table.summary(), sep="\\n")
    for row in table.rows(rejected): ...

CSV (separated by commas, semicolons, tabs or pipes) and JSON lines, in UTF-8, UTF-16 with its mark, or as told; columns
by their names or aliases (columns.py). The file is read twice and never held: once to count and check it, then
for the rows.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Rejection
from ..schema import SOURCES
from .columns import Columns, Mapper, check_fields, is_known
from .encoding import open_text, stamp_of
from .records import SEPARATORS, CsvSource, JsonSource, open_csv
from .scan import Look, is_empty, look_up, scan_table
from .values import BadCell, clean, clean_attribute, clean_id, printable

DELIMITED = (".csv", ".tsv", ".tab", ".txt")
JSON_LINES = (".jsonl", ".ndjson", ".json")

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


class Table:
    """An opened table; made by `open_table`."""

    def __init__(
        self,
        source: CsvSource | JsonSource,
        count: int,
        columns: Columns,
        images: Look,
        *,
        stamp: tuple[int, int],
    ) -> None:
        self.name = source.text.path.name
        self.count = count
        self.columns = columns
        self._source, self._images, self._stamp = source, images, stamp

    def summary(self) -> list[str]:
        """How the table was understood, in lines to print before any work."""
        kind = f"{self._source.describe()}, encoding {self._source.text.named}"
        lines = [
            f"{self.name}: {self.count} row{'s' * (self.count != 1)}, {kind}",
            f"  columns: {self.columns.describe()}",
            *(f"  {note}" for note in self.columns.notes),
            f"  images: {self._images.describe()}",
        ]
        return [printable(line) for line in lines]

    def rows(self, rejected: list[Rejection]) -> Iterator[Row]:
        """The usable rows; the others are appended to `rejected` by number. Raises ValueError when the file changed.

        A row with neither title nor category right after one of the same product, as Shopify writes its further
        images, has those of the row before.
        """
        self._check_unchanged()
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
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        path = self._source.text.path
        if stamp_of(path) != self._stamp:
            raise ValueError(f"{path}: changed while it was read; start again when it is complete")

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
            and is_empty(raw_title)
            and (is_empty(raw_category) or "category" not in fields)
        ):
            raw_title, raw_category = before.title, before.category
        title = clean(raw_title, "title", required=True)
        category = clean(raw_category, "category", required=True)
        images = tuple(name for column in columns.images for name in self._images.reader.names(cells.get(column)))
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

    Raises ValueError, in one line with the way out, when the file cannot be read as a table in full or a required
    column is not found; NoImages (scan.py), one of them, when none of the images looked up is there.
    """
    columns = columns or {}
    require_places(path, images)
    try:
        check_fields(columns)
        source = _open(path, columns, encoding, separator, quotes)
        stamp = stamp_of(path)
        try:
            scan = scan_table(source, columns)
            mapper = Mapper(str(path), scan.names, columns, filled=scan.filled, texts=scan.texts)
            mapper.require()
        except ValueError as error:
            hint = source.header_below(_known(columns)) if isinstance(source, CsvSource) else ""
            error.args = (f"{error}; {hint}" if hint else f"{error}",)
            raise
        look = look_up(mapper, scan, images)
        mapping = mapper.columns(look.columns)
    except ValueError as error:
        error.args = (printable(str(error)),)  # names of columns and files may hold anything
        raise
    return Table(source, scan.rows, mapping, look, stamp=stamp)


def require_places(table: Path, images: Path) -> None:
    """Raise ValueError unless there is a table, whatever it is, and a folder that may be entered."""
    for path, entered, what in ((table, "", "table"), (images, os.curdir, "folder of images")):
        try:
            os.stat(os.path.join(path, entered) if entered else path)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise ValueError(f"{path}: no such {what}") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); choose another {what}") from None


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
    letter = None if separator is None else _separator(separator)
    return open_csv(text, separator=letter, quotes=quotes, tabs=kind in (".tsv", ".tab"), known=_known(columns))


def _known(columns: Mapping[str, str]) -> Callable[[Collection[str]], int]:
    """Counts the names of a header that are understood."""
    given = set(columns.values())
    return lambda names: len({name for name in names if is_known(name) or name in given})


def _separator(given: str) -> str:
    letter = "\t" if given == "\\t" else SEPARATORS.get(given.lower(), given)
    if len(letter) != 1 or letter in '"\r\n\0' or letter.isalnum():
        names = ", ".join(SEPARATORS)
        raise ValueError(f"--separator {given!r}: expected {names}, or one character that is no letter, digit or quote")
    return letter
