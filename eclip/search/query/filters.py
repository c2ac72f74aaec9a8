"""Filters as SQL for LanceDB, and what is said of names that are not in the catalogue."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from eclip.search.embed.facts import facet_value
from eclip.search.query.query import Filters

_SHOWN = 5


def quoted(text: str) -> str:
    """A string literal of SQL. Within one only the quote itself means anything (DataFusion knows no backslashes)."""
    return "'" + text.replace("'", "''") + "'"


def has_category(name: str) -> str:
    """Rows of a category."""
    return f"category = {quoted(name)}"


def has_source(name: str) -> str:
    """Rows of images of a kind: detail, customer, ..."""
    return f"source = {quoted(name)}"


def has_attribute(name: str, value: str | int | bool) -> str:
    """Rows of which an attribute has this value."""
    return f"array_has(facets, {quoted(f'{name}={facet_value(value)}')})"


def predicate(filters: Filters) -> str | None:
    """SQL that a row must fulfil; None where nothing is filtered."""
    parts = [] if filters.category is None else [has_category(filters.category)]
    parts += [] if filters.source is None else [has_source(filters.source)]
    parts += [has_attribute(name, value) for name, value in filters.attributes.items()]
    if filters.price_min is not None:
        parts.append(f"price >= {float(filters.price_min)!r}")
    if filters.price_max is not None:
        parts.append(f"price <= {float(filters.price_max)!r}")
    return " AND ".join(parts) or None


def check_names(filters: Filters, count: Callable[[str], int], facets: Callable[[], dict[str, Any]]) -> None:
    """Raise ValueError for a category, a source, an attribute or a price that no row has, naming what is near.

    count: rows that fulfil some SQL. facets: those of the table (`Searcher.facets`), asked for only to find names.
    What exists and only never stands together is no error: it has no hits.
    """
    if filters.category is not None and not count(has_category(filters.category)):
        names = [entry["name"] for entry in facets()["categories"]]
        raise ValueError(f"no category {filters.category!r} in the catalogue{_near(filters.category, names)}")
    if filters.source is not None and not count(has_source(filters.source)):
        names = [entry["name"] for entry in facets()["sources"]]
        raise ValueError(f"no source {filters.source!r} in the catalogue{_near(filters.source, names)}")
    for name, value in filters.attributes.items():
        if count(has_attribute(name, value)):
            continue
        known = facets()["attributes"]
        if name not in known:
            raise ValueError(f"no attribute {name!r} in the catalogue{_near(name, known)}")
        values = [entry["value"] for entry in known[name]]
        raise ValueError(f"attribute {name!r} is never {value!r} in the catalogue{_near(facet_value(value), values)}")
    if (filters.price_min is not None or filters.price_max is not None) and not count("price IS NOT NULL"):
        raise ValueError("the catalogue has no prices: leave price_min and price_max out")


def _near(name: str, names: Iterable[str]) -> str:
    """The names like it, or else the first ones."""
    spelled = {known.casefold(): known for known in names}
    if not spelled:
        return ", which has none"
    near = [spelled[match] for match in get_close_matches(name.casefold(), spelled, n=_SHOWN)]
    if near:
        return f"; near it: {', '.join(map(repr, near))}"
    shown = list(spelled.values())
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"; there are {', '.join(map(repr, shown[:_SHOWN]))}{more}"
