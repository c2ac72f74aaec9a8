"""What a catalogue knows of an image, as the index holds it: attributes, the facets that filters ask for, a price."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST_FACET = 64
"""Letters of a value: what is longer is prose, and nobody filters by it."""
_AMOUNT = (
    r"\d+(?:\.\d{1,2})?|\d+,\d{2}|"  # 12  12.5  12.50  12,50
    r"\d{1,3}(?:,\d{3})+\.\d{2}|\d{1,3}(?:\.\d{3})+,\d{2}"  # 1,234.50  1.234,50
)
_CURRENCY = r"(?:[A-Z]{3}|[$€£¥₹])"
_PRICE = re.compile(rf"(?:{_CURRENCY}\s*)?({_AMOUNT})(?:\s*{_CURRENCY})?")


def image_attributes(product: Mapping[str, Any], sku: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an image: its product's, and where its SKU says otherwise (the colour, mostly) the SKU's."""
    return {**product, **sku}


def as_json(attributes: Mapping[str, Any]) -> str:
    """Attributes as JSON; NaN and infinity, which JSON has no word for, become null."""
    return json.dumps({name: _finite(value) for name, value in attributes.items()}, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facets(attributes: Mapping[str, Any]) -> list[str]:
    """ "name=value" of every attribute that is a short text, a whole number, a yes or no, or a list of such.

    Not the price and the category, which have columns of their own; measures (floats) are ranges and no facets.
    """
    found: dict[str, None] = {}
    for name, value in attributes.items():
        if name.lower() in ("price", "category"):
            continue
        for one in _values(value):
            found[f"{name}={one}"] = None
    return list(found)


def facet_value(value: str | int | bool) -> str:
    """A value as its facet says it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _values(value: Any) -> Iterator[str]:
    if isinstance(value, int):
        yield facet_value(value)
    elif isinstance(value, str):
        text = " ".join(value.split())
        if 0 < len(text) <= LONGEST_FACET:
            yield text
    elif isinstance(value, list | tuple):
        for one in value:
            if not isinstance(one, list | tuple):
                yield from _values(one)


def price(attributes: Mapping[str, Any]) -> float | None:
    """The attribute named price, whatever its case: a number, or a text of one amount ("EUR 12,50", "$1,234.50").

    None where there is none and where it cannot be told: "1,250" may be a thousand or one and a quarter, "9-12" two
    prices. Currencies are not converted.
    """
    value = next((value for name, value in attributes.items() if name.lower() == "price"), None)
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return _amount(value)
    match = _PRICE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    amount = match[1]
    if re.search(r",\d{2}$", amount):
        amount = amount.replace(".", "").replace(",", ".")
    return _amount(amount.replace(",", ""))


def _amount(value: str | int | float) -> float | None:
    """None for what is negative, infinite or none that a float can hold."""
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if 0 <= number < math.inf else None
