"""The records of a CSV or JSON-lines file, one at a time, with the line each begins at.

CSV is read strictly: Python's reader takes an unclosed quote for a cell that holds the rest of the file.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .encoding import TextFile
from .values import shown, strip

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
MAX_CELL = 1 << 24
"""Characters of a cell; a longer one is an unclosed quote, and would fill the memory with the rest of the table."""

_SNIFFED_LINES = 200
_PREAMBLE = 20  # rows among which a header is looked for that is not the first
_IMAGE_ENDING = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif)\b", re.IGNORECASE)
_EXCEL_LINE = re.compile(r'"?sep=(.)"?\1*\s*', re.IGNORECASE)


_WAYS_OUT = {  # by the first letter of a file that holds one value
    "[": "an array becomes lines by: jq -c '.[]' table.json > table.jsonl",
    "{": "objects over several lines become lines by: jq -c . table.json > table.jsonl",
}
_CUT = "this last line ends without a line end: complete the file if it was cut off, else mend or delete the line"


class Record(NamedTuple):
    """The named cells of one row, or the fault for which it is left out."""

    line: int
    cells: dict[str, Any]
    fault: str = ""
    detail: str = ""


@dataclass(frozen=True)
class CsvSource:
    """A delimited table; see `open_csv`."""

    text: TextFile
    columns: tuple[str, ...]
    separator: str
    quotes: bool
    labels: tuple[str, ...] = field(repr=False)
    """A name for each cell of the header, "" for those without; a name's second column is called "name (2)"."""

    def describe(self) -> str:
        """The kind of table, for a report."""
        named = next((name for name, letter in SEPARATORS.items() if letter == self.separator), repr(self.separator))
        return f"separator {named}" + ("" if self.quotes else ", no quotes")

    def records(self, wanted: Collection[str] | None = None) -> Iterator[Record]:
        """The rows, with the cells of the wanted columns (all by default); each call reads the file anew.

        A row has the header's number of cells; further ones must be empty, last ones without a name may lack. Raises
        ValueError, naming the line, for broken quotes and undecodable bytes.
        """
        places = [(i, name) for i, name in enumerate(self.labels) if name and (wanted is None or name in wanted)]
        width = len(self.labels)
        least = max((i + 1 for i, name in enumerate(self.labels) if name), default=0)
        rows = _data_rows(self.text, self.separator, self.quotes)
        next(rows, None)
        for line, lines, cells, zeros in rows:
            count = len(cells)
            if zeros:
                yield Record(line, {}, "zero bytes: a part of the file, and rows with it, may be lost")
            elif not any(cell.strip() for cell in cells):
                yield Record(line, {}, "empty row")
            elif _name(cells[0]) == self.labels[0] and tuple(map(_name, cells)) == self.labels:
                yield Record(line, {}, "the header once more")
            elif count > width and any(cell.strip() for cell in cells[width:]):
                yield Record(line, {}, "more cells than the header", f"{count} instead of {width}")
            elif count < least:
                yield Record(line, {}, "fewer cells than the header", f"{count} instead of {width}")
            elif lines > 1 and (name := self._swallows(cells, {name for _, name in places})):
                yield Record(
                    line, {}, f"{name} seems to hold whole rows: a quote that is not closed?", f"{lines} lines"
                )
            else:
                yield Record(line, {name: cells[i] for i, name in places})

    def header_below(self, known: Callable[[Sequence[str]], int]) -> str:
        """A hint at a line under the first that names more columns, with whatever separator, or ""."""
        best = max(1, known(self.columns))
        for separator in (self.separator, *SEPARATORS.values()):
            with suppress(ValueError):
                for row in islice(_data_rows(self.text, separator, self.quotes), 1, _PREAMBLE):
                    names = [_name(cell) for cell in row.cells]
                    if known(names) > best:
                        listed = ", ".join(filter(None, names[:10]))
                        return f"line {row.line} seems to name them ({listed}): delete the lines before it"
        return ""

    def _swallows(self, cells: list[str], wanted: Set[str]) -> str:
        """The column of a cell that holds the end of one row and the begin of another, or "".

        Such a cell has as many separators in its first line as there are columns after it, and in its last line as
        before it. So may a text of several lines: less likely where columns are many, or an image is named.
        """
        width = len(self.labels)
        for place, (name, cell) in enumerate(zip(self.labels, cells, strict=False)):
            inner = cell.splitlines()
            if len(inner) < 2 or inner[0].count(self.separator) != width - 1 - place:
                continue
            likely = (width > 5 and name in wanted) or _IMAGE_ENDING.search(cell)
            if likely and width > 2 and inner[-1].count(self.separator) == place:
                return name or f"column {place + 1}"
        return ""


@dataclass(frozen=True)
class JsonSource:
    """JSON lines: an object a line, whose keys may differ from line to line."""

    text: TextFile
    columns: None = None

    def describe(self) -> str:
        """The kind of table, for a report."""
        return "JSON lines"

    def records(self, wanted: Collection[str] | None = None) -> Iterator[Record]:
        """As of CsvSource. Raises ValueError, naming the line, for what is not a JSON object."""
        path = self.text.path
        for line, text in enumerate(self.text.lines(), start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text.lstrip("\ufeff"), object_pairs_hook=_object)
            except _RepeatedKeyError as repeated:
                yield Record(line, {}, "a key occurs twice", shown(str(repeated)))
                continue
            except (ValueError, RecursionError) as error:
                way_out = _WAYS_OUT.get(text.strip()[:1]) if line == 1 else None
                way_out = way_out or (_CUT if not text.endswith(("\n", "\r")) else "mend or delete the line")
                reason = f"{error}; JSON lines hold an object a line; {way_out}"
                raise ValueError(f"{path}, line {line}: not valid JSON ({reason}); it begins {_begin(text)}") from error
            if not isinstance(row, dict):
                way_out = _WAYS_OUT["["] if isinstance(row, list) else "mend or delete the line"
                found = f"expected a JSON object, found {type(row).__name__}"
                raise ValueError(f"{path}, line {line}: {found}; {way_out}; it begins {_begin(text)}")
            yield Record(line, {k: v for k, v in row.items() if wanted is None or k in wanted})


def _begin(text: str) -> str:
    return shown(text[:40])


class _RepeatedKeyError(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def open_csv(
    text: TextFile, *, separator: str | None, quotes: bool, tabs: bool, known: Callable[[Sequence[str]], int]
) -> CsvSource:
    """A delimited table with its header read and, unless given, its separator found.

    tabs: whether a tab wins among equals. known: how many of a header's names are understood, which tells separators
    apart. Raises ValueError when there is no header.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    separator = separator or _excel_separator(text) or _sniff(text, quotes, tabs, known)
    first = next(_data_rows(text, separator, quotes), None)
    if first is None:
        raise ValueError(f"{text.path}: empty; expected a table whose first line names the columns")
    labels: list[str] = []
    for name in map(_name, first.cells):
        count = sum(label == name or label.startswith(f"{name} (") for label in labels) if name else 0
        labels.append(f"{name} ({count + 1})" if count and name in labels else name)
    return CsvSource(text, tuple(filter(None, labels)), separator, quotes, tuple(labels))


def _name(cell: str) -> str:
    return " ".join(strip(cell).split())


class _Parsed(NamedTuple):
    line: int
    """The first of its lines."""
    lines: int
    cells: list[str]
    """Empty for a blank line."""
    zeros: bool
    """Whether it held NUL characters, which became others."""


def _rows(lines: Iterator[str], path: Path, separator: str, quotes: bool, first: int) -> Iterator[_Parsed]:
    """The records of these lines, of which the first has the number `first`."""
    held: list[str] = []
    zeros = False

    def feed() -> Iterator[str]:
        nonlocal zeros
        for line in lines:
            if "\0" in line:  # at which Python 3.10's reader raises
                line, zeros = line.replace("\0", "\x1a"), True
            held.append(line)
            yield line

    reader = csv.reader(
        feed(),
        delimiter=separator,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        skipinitialspace=separator != " ",  # a quote after a blank opens a cell too
    )
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(_broken(error, path, first, "".join(held), separator)) from error
        yield _Parsed(first, len(held), cells, zeros)
        first += len(held)
        held.clear()
        zeros = False


def _data_rows(text: TextFile, separator: str, quotes: bool) -> Iterator[_Parsed]:
    """The header and the rows, without blank lines and Excel's `sep=;` line."""
    lines, first = text.lines(), 1
    for line in lines:
        if line.strip("\ufeff \t\r\n") and not _EXCEL_LINE.fullmatch(line.lstrip("\ufeff")):
            break
        first += 1
    else:
        return

    def rest() -> Iterator[str]:
        yield line.lstrip("\ufeff")
        yield from lines

    for row in _rows(rest(), text.path, separator, quotes, first):
        if len(row.cells) > 1 or (row.cells and row.cells[0].strip()):
            yield row


def _broken(error: csv.Error, path: Path, first: int, text: str, separator: str) -> str:
    """The line at which the cell that the reader could not end begins, and what is wrong with it."""
    begin = _last_cell(text, separator)
    before = text[:begin]
    line = first + before.count("\n") + before.count("\r") - before.count("\r\n")
    if "field larger" in str(error):
        wrong = f"a cell begins here and does not end within {MAX_CELL // 10**6} million characters: close its quote"
    elif "expected after" in str(error):
        wrong = "the quoted cell that begins here has text after its closing quote"
    elif "unexpected end" in str(error):
        wrong = "the quoted cell that begins here never ends: close its quote"
    else:
        return f"{path}, line {line}: not valid CSV ({error})"
    cell = _begin(text[begin:].splitlines()[0])
    escaped = '; quotes written \\" are doubled by: sed \'s/\\\\"/""/g\'' if '\\"' in text else ""
    return (
        f"{path}, line {line}: {wrong}, or double each quote that belongs to the text "
        f'(24"" monitor), or give --no-quotes where quotes are letters{escaped}; it begins {cell}'
    )


def _last_cell(text: str, separator: str) -> int:
    """Where the last cell begins of a record that the reader gave up in."""
    position = 0
    while True:
        begin = position
        while text[position : position + 1] == " " != separator:
            position += 1
        if text[position : position + 1] == '"':
            end = text.find('"', position + 1)
            while end >= 0 and text[end + 1 : end + 2] == '"':
                end = text.find('"', end + 2)
            if end < 0 or text[end + 1 : end + 2] != separator:
                return position
            position = end + 2
        else:
            position = text.find(separator, begin) + 1
            if not position:
                return begin


def _excel_separator(text: TextFile) -> str | None:
    first = next((line.lstrip("\ufeff") for line in text.lines() if line.strip("\ufeff \t\r\n")), "")
    excel = _EXCEL_LINE.fullmatch(first)
    return excel[1] if excel else None


def _sniff(text: TextFile, quotes: bool, tabs: bool, known: Callable[[Sequence[str]], int]) -> str:
    """The separator under which the header is understood best, the rows agree with it, and it has most columns."""
    lines = list(islice(text.lines(), _SNIFFED_LINES))
    order = sorted(SEPARATORS.values(), key=lambda letter: letter != "\t") if tabs else list(SEPARATORS.values())

    def score(separator: str) -> tuple[int, float, int]:
        counts: list[int] = []
        names: list[str] = []
        try:
            for row in _rows(iter(lines), text.path, separator, quotes, 1):
                if any(cell.strip("\ufeff \t") for cell in row.cells):
                    names = names or [strip(cell) for cell in row.cells]
                    counts.append(len(row.cells))
        except ValueError:  # here or after the lines looked at: said when the table is read
            pass
        alike = sum(count == len(names) for count in counts) / len(counts) if counts else 0.0
        return (known(names), alike, len(names)) if len(names) > 1 else (0, 0.0, 0)

    return max(order, key=score)
