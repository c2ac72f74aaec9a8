"""The first reading of a table: what is broken is found, and a sample tells columns and image names apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .columns import Mapper, compact, is_known
from .image_names import ImageNames, almost_there, explain_absence
from .records import CsvSource, JsonSource, Record
from .values import BadCell, is_missing, strip

_SAMPLE = 1000
_LOOKED_UP = 300  # cells of the sample; a look-up in a store far away takes about a millisecond
_LONG = 1 << 16  # characters of a cell that the sample keeps
_MOST_COLUMNS = 10_000


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
        return {name for cells in self.sample for name, cell in cells.items() if not _stands_for_nothing(cell)}

    @property
    def texts(self) -> set[str]:
        """Columns with a cell in the sample that may be a text: lists and objects of JSON lines are none."""
        items = (item for cells in self.sample for item in cells.items())
        return {name for name, cell in items if not isinstance(cell, (list, dict)) and not _stands_for_nothing(cell)}


def scan_table(source: CsvSource | JsonSource, columns: Mapping[str, str]) -> Scan:
    """Read the whole table once.

    Raises ValueError for what is broken anywhere in it, for a table without rows, and when most rows have another
    number of cells than the header.
    """
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


class NoImages(ValueError):
    """None of the images looked up is there; `names` are theirs, a sample of the table's."""

    def __init__(self, message: str, names: list[str]):
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Look:
    """Columns of images, how their cells are read, the names in the sample and those of them without a file."""

    columns: list[str]
    reader: ImageNames
    names: list[str]
    absent: list[str]

    @property
    def found(self) -> int:
        """How many of the names are there."""
        return len(self.names) - len(self.absent)

    def describe(self) -> str:
        """What was found, for a report, with a hint at a name that is not there."""
        hint = almost_there(self.reader.folder, self.absent)
        found = f"{self.found} of {len(self.names)} looked up are below {self.reader.folder}"
        return f"{self.reader.describe()}; {found}" + (f" ({hint})" if hint else "")


def _look(scan: Scan, folder: Path, columns: list[str]) -> Look:
    cells = [row[name] for row in scan.sample for name in columns if not is_empty(row.get(name))]
    look = _look_at(cells[:: -(-len(cells) // _LOOKED_UP) or 1], folder, columns)
    return look if look.found else _look_at(cells, folder, columns)  # where few of the images are there


def _look_at(cells: list[Any], folder: Path, columns: list[str]) -> Look:
    reader = ImageNames(folder)
    reader.learn(cells)
    names = [name for cell in cells for name in _names(reader, cell)]
    return Look(columns, reader, names, [name for name in names if not reader.exists(name)])


def look_up(mapper: Mapper, scan: Scan, folder: Path) -> Look:
    """The first candidates for columns of images whose files are there, with further columns of which that is true.

    Raises NoImages when names were looked up and none is there.
    """
    looks: list[Look] = []
    for columns in mapper.image_candidates():
        looks.append(_look(scan, folder, columns))
        if looks[-1].found:
            others = [name for name in mapper.further_images() if name not in columns]
            more = [name for name in others if _look(scan, folder, [name]).found]
            return _look(scan, folder, [*columns, *more]) if more else looks[-1]
    named = next((look for look in looks if look.names), None)
    if named:
        raise NoImages(f"{mapper.table}: {explain_absence(folder, named.names, named.columns[0])}", named.names)
    return looks[0] if looks else Look([], ImageNames(folder), [], [])


def _names(reader: ImageNames, cell: Any) -> list[str]:
    try:
        return reader.names(cell)
    except BadCell:  # its row will be rejected
        return []


def _short(cell: Any) -> Any:
    return cell[:_LONG] if isinstance(cell, str) else cell


def is_empty(cell: Any) -> bool:
    """Whether there is nothing in a cell, not even a mark for a missing value."""
    return cell is None or cell == [] or (isinstance(cell, str) and not strip(cell))


def _stands_for_nothing(cell: Any) -> bool:
    return is_empty(cell) or cell != cell or (isinstance(cell, str) and is_missing(strip(cell)))
