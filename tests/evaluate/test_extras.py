"""Which photos are prompted by whose titles, and whose tokens are kept, before any image is encoded."""

import numpy as np
import pytest

import eclip.evaluate.extras as extras_module
from eclip.dataloading.schema import Product
from eclip.evaluate.extras import NOTHING, choose_extras, spread
from tests.evaluate.colours import NAMES, Catalogue

ROWS = np.arange(18)  # detail, customer, ad of six colours in turn


def _facts(catalogue: Catalogue) -> dict[int, Product]:
    return {p: catalogue.product(p) for p in range(catalogue.num_products)}


def test_a_photo_is_prompted_by_a_customer_title_of_another_product_in_it() -> None:
    catalogue = Catalogue()
    extras = choose_extras(catalogue, ROWS, _facts(catalogue))  # type: ignore[arg-type]
    assert sorted(extras.prompts) == [1, 4, 7, 10, 13, 16]
    assert extras.prompts == {row: (row + 3) % 18 for row in extras.prompts}  # the neighbour's customer photo
    assert extras.tokens == NOTHING.tokens == frozenset()


def test_only_products_that_take_part_prompt() -> None:
    catalogue = Catalogue()
    first = {p: fact for p, fact in _facts(catalogue).items() if p < 2}
    extras = choose_extras(catalogue, ROWS[:6], first)  # type: ignore[arg-type]
    assert extras.prompts == {1: 4}  # lime's neighbour, blue, is not among them
    unknown = Catalogue(boxes=False)
    assert choose_extras(unknown, ROWS, _facts(unknown)).prompts == {}  # type: ignore[arg-type]


def test_tokens_are_kept_of_a_sample_of_photos_and_of_few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue()
    pages = {3 * p for p in range(len(NAMES))}
    kept = choose_extras(catalogue, ROWS, _facts(catalogue), sample=2).tokens  # type: ignore[arg-type]
    assert kept == pages | {1, 16}
    monkeypatch.setattr(extras_module, "MAX_PAGES", 5)
    assert choose_extras(catalogue, ROWS, _facts(catalogue), sample=2).tokens == {1, 16}  # type: ignore[arg-type]


def test_spread_takes_both_ends_and_no_value_twice() -> None:
    assert spread(np.arange(10), 3).tolist() in ([0, 4, 9], [0, 5, 9])
    assert spread(np.arange(3), 5).tolist() == [0, 1, 2]
    assert spread(np.arange(10), 1).tolist() == [0]
