"""Attributes, facets and prices of what shops write."""

import json
import math
from typing import Any

import pytest

from eclip.search.embed.facts import as_json, facets, image_attributes, price


def test_a_skus_attributes_stand_before_the_products() -> None:
    assert image_attributes({"colour": "red", "size": 3}, {"colour": "blue"}) == {"colour": "blue", "size": 3}


def test_facets_are_what_one_chooses_from() -> None:
    attributes = {
        "colour": " dark  red ", "colours": ["red", "blue", "red"], "seats": 3, "washable": True, "weight": 2.5,
        "price": 9, "Category": "x", "care": "a" * 65, "empty": "", "nested": {"a": 1}, "size_cm": [1.5, 2.0],
    }  # fmt: skip
    assert facets(attributes) == ["colour=dark red", "colours=red", "colours=blue", "seats=3", "washable=yes"]


@pytest.mark.parametrize(
    "value, number",
    [
        *((12, 12.0), (12.5, 12.5), ("12", 12.0), ("12.50", 12.5), ("12,50", 12.5), ("EUR 12,50", 12.5)),
        *(("€12.5", 12.5), ("12 €", 12.0), ("$1,234.50", 1234.5), ("1.234,50 EUR", 1234.5), (" 3 ", 3.0)),
        *(("1,250", None), ("1.250", None), ("9-12", None), ("from 3", None), ("", None), (None, None)),
        *((True, None), (-1, None), (math.nan, None), (math.inf, None), (["1"], None), ("1" * 5 + ",5", None)),
    ],
)
def test_prices_are_read_where_they_can_be_told(value: Any, number: float | None) -> None:
    assert price({"Price": value}) == number


def test_a_price_that_no_number_holds() -> None:
    assert price({"price": 10**400}) is None and price({"price": "9" * 400}) is None


def test_no_price_is_none() -> None:
    assert price({}) is None


def test_attributes_are_json() -> None:
    assert json.loads(as_json({"a": math.nan, "b": [math.inf, {"c": 1}], "d": "ü"})) == {
        "a": None, "b": [None, {"c": 1}], "d": "ü",
    }  # fmt: skip
