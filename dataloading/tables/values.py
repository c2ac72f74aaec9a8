"""Cells of a table to clean values: what counts as missing, and what cannot be a text.

A cell that cannot be used raises BadCell, whose reason is one of few sentences: equal faults count together.
"""

import json
import math
import re
import unicodedata
from typing import Any

MISSING = frozenset(
    (
        *("nan", "-nan", "null", "(null)", "none", "nil", "n/a", "na", "<na>", "nat", "\\n", "undefined", "-", "--"),
        *("#n/a", "#n/a n/a", "#na", "#null!", "#ref!", "#value!", "#name?", "#div/0!", "#num!", "#error!", "#spill!"),
        *("1.#qnan", "-1.#qnan", "1.#ind", "-1.#ind", "[object object]"),
    )
)
"""What pandas, R, spreadsheets, databases and JavaScript write for a missing or failed cell, whatever the case."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # those that are not blanks
_EDGES = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
_EDGES += "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff"
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0\u2800\ufffc")  # letters and symbols without ink
_SCIENTIFIC = re.compile(r"\d(?:[.,]\d+)?E\+\d+")
_EXACT = 2**53  # above it a float is one of several whole numbers


class BadCell(Exception):
    """A cell, and with it its row, that cannot be used: `reason` groups, `detail` is this cell's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = printable(reason), printable(detail)


def strip(text: str) -> str:
    """Without blanks, byte order marks and zero-width characters at both ends."""
    return text.strip(_EDGES)


def clean(value: Any, field: str, *, required: bool = False) -> str:
    """The cell as one line of text; "" when it is missing. field: its name in reasons.

    Numbers become digits (a float that is whole without its ".0", as pandas writes ids beside missing ones). Runs of
    blanks become one, letters with accents one character (NFC), so that equal texts are equal. Raises BadCell for
    lists, objects, booleans, infinities, control characters and lone surrogates; where required also for marks of a
    missing value and for texts without a visible character, so that a product whose title really is "None" is listed
    and not lost.
    """
    if value is None or value == "":
        return ""
    text = unicodedata.normalize("NFC", " ".join(strip(_as_text(value, field)).split()))
    if not text:
        return ""
    if _SURROGATE.search(text):
        raise BadCell(f"{field} holds half a character (a lone surrogate)", shown(text))
    fault = "a mark for a missing value" if is_missing(text) else "" if _visible(text) else "no visible character"
    if fault:
        if required:
            raise BadCell(f"no {field} ({fault})", shown(text))
        return ""
    if _CONTROL.search(text):
        raise BadCell(f"{field} holds control characters", shown(text))
    return text


def clean_id(value: Any, field: str) -> str:
    """A required id: as `clean`, and a number that a spreadsheet has rounded ("4.00638E+12") is no id."""
    text = clean(value, field, required=True)
    if _SCIENTIFIC.fullmatch(text):
        raise BadCell(f"{field} is a number that a spreadsheet has rounded: format that column as text", shown(text))
    return text


def clean_attribute(value: Any, field: str) -> Any:
    """Any JSON value, None when missing. Raises BadCell for what JSON in UTF-8 cannot hold (NaN, lone surrogates)."""
    if isinstance(value, str):
        value = strip(value)
        value = None if not value or is_missing(value) else value
    elif isinstance(value, float) and math.isnan(value):
        value = None
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadCell(f"{field} holds NaN, an infinite number or half a character", shown(value)) from error
    return value


def is_missing(text: str) -> bool:
    """Whether the text stands for a missing value."""
    return text.casefold() in MISSING


def printable(text: str) -> str:
    """The text on one line: what does not print, also lone surrogates, is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value for a message: on one line, what does not print escaped, at most 80 characters."""
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_text(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise BadCell(f"{field} is true or false, not text", shown(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isinf(value):
            raise BadCell(f"{field} is an infinite number, not text")
        if abs(value) >= _EXACT:
            raise BadCell(f"{field} is a number too long to be exact: write it as text", shown(value))
        return str(int(value)) if value.is_integer() else repr(value)
    kind = "a list" if isinstance(value, list) else "an object"
    raise BadCell(f"{field} is {kind}, not text: write its text alone (jq does), or name another column", shown(value))


def _visible(text: str) -> bool:
    return any(_has_ink(letter) for letter in text)


def _has_ink(letter: str) -> bool:
    kind = unicodedata.category(letter)
    if kind == "Cn":  # also an emoji newer than this Python; not one of the 66 that never are characters
        return ord(letter) & 0xFFFE != 0xFFFE and not 0xFDD0 <= ord(letter) <= 0xFDEF
    return kind[0] in "LNPS" and letter not in _FILLERS
