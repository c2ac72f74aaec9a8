"""A request's fields, of a form or of JSON, each checked: a wrong one is refused by name.

A photo is bytes, and only bytes: no field is ever taken for a path, and the names of uploaded files are not read.
"""

import base64
import binascii
import json
import math
from collections.abc import Collection
from typing import Any

from eclip.dataloading.schema import Box
from eclip.serve.limits import Limits, Refusal

_YES, _NO = ("true", "1", "on", "yes"), ("false", "0", "off", "no", "")


class Fields:
    """What a client sent: names to values, a name perhaps several times."""

    def __init__(self, values: dict[str, list[Any]], limits: Limits) -> None:
        """values: str of a form, bytes of an uploaded file, or what JSON knows."""
        self._values, self._limits = values, limits

    def only(self, names: Collection[str]) -> None:
        """Refuse a field that is not among `names`: a misspelt filter would be none."""
        for name in self._values:
            if name not in names:
                raise Refusal(422, f"{name[:50]!r}: no such field; known are {', '.join(names)}")

    def all(self, name: str) -> list[Any]:
        """Its values."""
        return self._values.get(name, [])

    def one(self, name: str) -> Any:
        """Its value, or None; an empty field of a form was left empty."""
        values = self.all(name)
        if len(values) > 1:
            raise Refusal(422, f"{name} is given {len(values)} times: give one")
        value = values[0] if values else None
        return None if isinstance(value, str) and not value.strip() else value

    def text(self, name: str) -> str | None:
        """A text that is not blank, or None."""
        value = self.one(name)
        return None if value is None else self.checked_text(name, value)

    def texts(self, name: str, most: int) -> list[str]:
        """All of a name, none of them blank."""
        values = self.all(name)
        if len(values) > most:
            raise Refusal(413, f"{len(values)} {name}: at most {most} at a time")
        return [self.checked_text(f"{name}[{i}]", value) for i, value in enumerate(values)]

    def checked_text(self, name: str, value: Any) -> str:
        """Refuse what is no text, blank, or too long."""
        if not isinstance(value, str):
            raise Refusal(422, f"{name}: text is wanted, not {_kind(value)}")
        if not value.strip():
            raise Refusal(422, f"{name} is empty: say what is looked for")
        if len(value) > self._limits.characters:
            raise Refusal(422, f"{name}: {len(value)} characters are more than {self._limits.characters}")
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can name
            raise Refusal(422, f"{name}: not valid Unicode") from None
        return value

    def number(self, name: str) -> float | None:
        """A finite number, or None."""
        value = self.one(name)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool | bytes | list | dict) else float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise Refusal(422, f"{name}={_shown(value)}: a number is wanted")
        return number

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        number = self.number(name)
        if number is None:
            return default
        if number != int(number) or not low <= number <= high:
            raise Refusal(422, f"{name}={_shown(self.one(name))}: a whole number from {low} to {high} is wanted")
        return int(number)

    def switch(self, name: str) -> bool:
        """Whether it is on; true, 1, on and yes are."""
        value = self.one(name)
        text = "" if value is None else str(value).strip().lower()
        if text not in _YES + _NO or isinstance(value, bytes):
            raise Refusal(422, f"{name}={_shown(value)}: true or false is wanted")
        return text in _YES

    def box(self, name: str) -> Box | None:
        """ "x0,y0,x1,y1" or a list of four numbers."""
        value = self.one(name) if len(self.all(name)) < 2 else self.all(name)
        if value is None:
            return None
        parts = value.split(",") if isinstance(value, str) else value
        try:
            numbers = [float(part) for part in parts if not isinstance(part, bool)]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise Refusal(422, f"{name}={_shown(value)}: four numbers x0,y0,x1,y1 in pixels of the photo are wanted")
        x0, y0, x1, y1 = numbers
        return x0, y0, x1, y1

    def photo(self, name: str) -> bytes | None:
        """The bytes of an image file, or None."""
        value = self.one(name)
        return None if value is None else _bytes(name, value)

    def photos(self, name: str, most: int) -> list[bytes]:
        """All of a name."""
        values = self.all(name)
        if len(values) > most:
            raise Refusal(413, f"{len(values)} {name}: at most {most} at a time")
        return [_bytes(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _bytes(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise Refusal(422, f"{name}: the bytes of an image file are wanted, uploaded or as base64; paths are never opened")


async def read_fields(request: Any, limits: Limits) -> Fields:
    """The fields of a starlette Request. Raises Refusal: 400 for a broken body, 415 for another kind of body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Fields(_json_fields(await request.body()), limits)
    if kind != "multipart/form-data":
        raise Refusal(415, f"content type {kind[:50]!r}: send multipart/form-data or application/json")
    values: dict[str, list[Any]] = {}
    most = {"max_files": limits.photos, "max_fields": limits.fields, "max_part_size": limits.field_bytes}
    async with request.form(**most) as form:
        for name, value in form.multi_items():
            values.setdefault(name, []).append(value if isinstance(value, str) else await value.read())
    return Fields(values, limits)


def _json_fields(body: bytes) -> dict[str, list[Any]]:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    try:
        told = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(told, dict):
        raise Refusal(422, f"the body: an object of fields is wanted, not {_kind(told)}")
    return {
        name: value if isinstance(value, list) else [value] for name, value in told.items() if value is not None
    }


def _kind(value: Any) -> str:
    kinds = {bytes: "a file", list: "a list", dict: "an object", bool: "true or false", int: "a number", str: "text"}
    return kinds.get(type(value), "a number" if isinstance(value, float) else "nothing")


def _shown(value: Any) -> str:
    return _kind(value) if isinstance(value, bytes) else repr(value)[:60]
