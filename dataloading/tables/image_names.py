"""The images that a table's cell names: how lists are split and paths are spelt, checked against the files there.

Names are looked up, those of a sample before the work, later only those that could be read in two ways. The folder,
which may hold a million files, is never listed; a refusal looks at the first of them for a hint.
"""

import json
import math
import os
import re
import unicodedata
import warnings
from ast import literal_eval
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .values import BadCell, is_missing, shown, strip

_SEPARATORS = {"|": "'|'", ";": "';'", ",": "','", "\n": "line ends", " ": "blanks"}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
"""Tried in this order after a name without an ending, as product ids are used for names."""

_MOST_PIECES = 64
_LISTED = 10_000  # files of a folder that are read for a hint
_PLAIN = re.compile(r"(?![./])[\w/.+-]*\.[A-Za-z]\w*", re.ASCII)  # only one way to spell it
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_QUOTED = re.compile(r"""[ub]?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL)


@dataclass
class ImageNames:
    """Reads cells of image names for one folder. separator: of lists that cannot be told from names, see `learn`."""

    folder: Path
    separator: str = "|"

    def __post_init__(self) -> None:
        roots = {os.path.abspath(self.folder), os.path.realpath(self.folder)}
        self._roots = tuple(os.path.join(os.fsencode(root), b"") for root in roots)

    def exists(self, name: str) -> bool:
        """Whether there is a file of exactly this path below the folder."""
        try:
            path = os.path.normpath(os.path.join(self._roots[0], name.encode("utf-8", "surrogateescape")))
        except UnicodeEncodeError:
            return False
        return path.startswith(self._roots) and os.path.isfile(path)

    def locate(self, name: str) -> str | None:
        """The spelling of a name under which its file is there, or None."""
        return next((spelling for spelling in _spellings(name) if self.exists(spelling)), None)

    def names(self, cell: Any) -> list[str]:
        """The names in a cell, as their files are spelt where they are there. Raises BadCell for what is no name."""
        found = dict.fromkeys(filter(None, map(self._settled, self._list(cell))))
        for name in found:
            if any("\ud800" <= letter <= "\udfff" for letter in name) and not self.exists(name):
                raise BadCell("image holds half a character (a lone surrogate)", shown(name))
        return list(found)

    def learn(self, cells: Iterable[Any]) -> None:
        """Take the separator that splits these cells into most names whose files are there."""
        found = dict.fromkeys(_SEPARATORS, 0)
        for cell in cells:
            if not isinstance(cell, str) or self.locate(strip(cell)):
                continue
            for separator in _SEPARATORS:
                pieces = _pieces(cell, separator)
                if len(pieces) > 1:
                    found[separator] += sum(self.locate(piece) is not None for piece in pieces)
        self.separator = max(found, key=lambda separator: found[separator])

    def describe(self) -> str:
        """How lists are split, for a report."""
        return f"several in a cell are separated by {_SEPARATORS[self.separator]}"

    def _settled(self, name: str) -> str:
        if _PLAIN.fullmatch(name) or _URL.match(name):
            return name
        return self.locate(name) or name.replace("\\", "/").lstrip("/")

    def _list(self, cell: Any) -> list[str]:
        if isinstance(cell, str):
            cell = strip(cell)
            if is_missing(cell) and not self.exists(cell):
                return []
            listed = _listed_in(cell) if cell.startswith("[") and not self.exists(cell) else None
            if listed is None:
                return self._split(cell) if cell else []
            cell = listed
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return []
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)  # as pandas writes ids beside missing ones
        if isinstance(cell, bool) or not isinstance(cell, (int, list)):
            raise BadCell("image is neither a name nor a list of names", shown(cell))
        names: list[str] = []
        for item in cell if isinstance(cell, list) else [cell]:
            if isinstance(item, bool) or not isinstance(item, (str, int, type(None))):
                raise BadCell("image is a list of something else than names: write names alone (jq does)", shown(item))
            name = strip(str(item)) if item is not None else ""
            names += [name] if name and not is_missing(name) else []
        return names

    def _split(self, cell: str) -> list[str]:
        usual = self.separator
        separators = [s for s in (usual, *(s for s in _SEPARATORS if s != usual)) if s in cell]
        if not separators or self.locate(cell):
            return [cell]
        for separator in separators:
            pieces = _pieces(cell, separator)
            if all(self.locate(piece) for piece in pieces):
                return pieces
        return self._joined(cell.split(usual), usual) if usual in cell else [cell]

    def _joined(self, pieces: Sequence[str], separator: str) -> list[str]:
        """The names in a list some of whose names hold the separator themselves: the longest that are there."""
        names: list[str] = []
        first = 0
        while first < len(pieces):
            longest = len(pieces) if len(pieces) <= _MOST_PIECES else first + 1
            ends = range(longest, first + 1, -1)
            end = next((e for e in ends if self.locate(strip(separator.join(pieces[first:e])))), first + 1)
            name = strip(separator.join(pieces[first:end]))
            names += [name] if name else []
            first = end
        return names


def explain_absence(folder: Path, names: Sequence[str], column: str) -> str:
    """Why none of these names is below the folder, as far as it can be told, and the way out."""
    first = f"none of {len(names)} image names of column {column!r} is a file below {folder} (first: {shown(names[0])})"
    names = names[:: -(-len(names) // 20)]
    if sum(_URL.match(name) is not None for name in names) * 2 > len(names):
        tail = "they are URLs: download the images first (img2dataset does) and give a column of their file names"
        return f"{first}; {tail} with --column image=NAME"
    for other in _folders_nearby(folder):
        there = ImageNames(other)
        if any(there.locate(name) for name in names):
            return f"{first}; they are below {other}: give --images {other}"
    here = ImageNames(folder)
    if any(here.locate(re.split(r"[\\/]", name)[-1]) for name in names):
        return f"{first}; there are files of these names without the folders in front: remove those from the column"
    if almost := almost_there(folder, names):
        return f"{first}; {almost}: write the names as the files have them"
    return f"{first}; give the folder that the names start from with --images"


def almost_there(folder: Path, names: Sequence[str]) -> str:
    """A name without a file beside the file that it may mean, of another case or ending; "" for none found."""
    for name in names[:20]:
        parent, base = os.path.split(name)
        if os.path.isabs(parent) or os.pardir in parent.split(os.sep):
            continue
        try:
            with os.scandir(folder / parent) as entries:
                there = {_folded(entry.name): entry.name for entry in islice(entries, _LISTED)}
        except (OSError, ValueError):
            continue
        stems = {os.path.splitext(folded)[0]: found for folded, found in there.items()}
        same, stem = there.get(_folded(base)), stems.get(os.path.splitext(_folded(base))[0])
        if found := same or stem:
            differs = "upper and lower case differ" if same else "its ending is another"
            return f"instead of {shown(name)} there is {shown(os.path.join(parent, found))} ({differs})"
    return ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _folders_nearby(folder: Path) -> Iterator[Path]:
    yield from list(Path(os.path.abspath(folder)).parents)[:3]
    try:
        with os.scandir(folder) as entries:
            yield from (folder / entry.name for entry in islice(entries, 200) if entry.is_dir())
    except OSError:
        return


def _spellings(name: str) -> Iterator[str]:
    """A path as it is; out of a file URL, with / for \\, below the folder, without a URL's query, unescaped, in both
    Unicode forms, with an ending: each on top of those before."""
    yield name
    if not name or _URL.match(name):
        return
    if name[:7].casefold() == "file://":  # a host may follow
        yield (name := "/" + name[7:].partition("/")[2])
        yield (name := unquote(name))
    if "\\" in name or name.startswith("/"):
        yield (name := name.replace("\\", "/").lstrip("/"))
    if "?" in name:
        yield (name := name.partition("?")[0])
    if "%" in name:
        yield (name := unquote(name))
    if not name.isascii():
        yield unicodedata.normalize("NFC", name)
        yield unicodedata.normalize("NFD", name)
    if name and not re.search(r"\.[A-Za-z]\w{1,4}$", name):
        whole = [name[:-2]] if re.fullmatch(r"\d+\.0", name) else []  # an id that pandas read as a number
        yield from (stem + ending for stem in (name, *whole) for ending in ENDINGS)


def _pieces(cell: str, separator: str) -> list[str]:
    pieces = cell.split() if separator == " " else cell.split(separator)
    return [piece for piece in map(strip, pieces) if piece]


def _listed_in(cell: str) -> list[Any] | None:
    """A list written into a cell as JSON, Python or NumPy do it, or None when the cell holds no such list."""
    try:
        found = json.loads(cell)
        return found if isinstance(found, list) else None
    except (ValueError, RecursionError):
        pass
    if not cell.endswith("]") or _QUOTED.sub("", cell[1:-1]).strip(", \n\t"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own about backslashes that escape nothing
        return [_unquoted(quoted) for quoted in _QUOTED.findall(cell[1:-1])]


def _unquoted(quoted: str) -> Any:
    try:
        return literal_eval(quoted)
    except (SyntaxError, ValueError):  # backslashes that are letters ('C:\\users'), line ends
        return re.sub(r"\\([\\'\"])", r"\1", quoted[1:-1])
