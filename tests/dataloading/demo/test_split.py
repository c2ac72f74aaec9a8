"""Which products are near-identical, and the sides of the split."""

from collections import Counter, defaultdict

import pytest

from eclip.dataloading.demo.products import CatalogProduct, load_view, read_catalog
from eclip.dataloading.demo.split import near_identical, split_products
from eclip.dataloading.demo.titles import head_noun


@pytest.fixture(scope="module")
def split() -> tuple[tuple[CatalogProduct, ...], list[str], list[str], list[str]]:
    products = read_catalog()
    catalog, series = near_identical(products, lambda p: [load_view(name) for name in p.skus[0].views])
    return products, catalog, series, split_products(products, series)


def test_split_shares_and_stratification(split) -> None:
    products, _, _, sides = split
    counts = Counter(sides)
    assert counts["test"] == round(0.2 * 172) and counts["val"] == round(0.1 * 172)
    trained = {head_noun(p) for p, side in zip(products, sides, strict=True) if side == "train"}
    for name in ("val", "test"):
        nouns = [head_noun(p) for p, side in zip(products, sides, strict=True) if side == name]
        seen = sum(noun in trained for noun in nouns) / len(nouns)
        assert 0.6 < seen < 1, f"{name}: most head nouns occur in training, and some do not"
    by_category = {p.category for p, side in zip(products, sides, strict=True) if side == "train"}
    assert by_category == {p.category for p in products}


def test_near_identical_shapes_stay_together(split) -> None:
    products, catalog, series, sides = split
    position = {p.product[-3:]: i for i, p in enumerate(products)}
    for groups in (catalog, series):
        of_group = defaultdict(set)
        for group, side in zip(groups, sides, strict=True):
            of_group[group].add(side)
        assert all(len(s) == 1 for s in of_group.values())
    # Lower cabinet and drawers cabinet, the two speakers, two of the rocks: one entry each. Two beds of one uploader
    # differ in shape but stay on one side; chairs of different creators are apart.
    for a, b in (("144", "153"), ("043", "044"), ("163", "164")):
        assert catalog[position[a]] == catalog[position[b]]
    assert catalog[position["002"]] != catalog[position["003"]]
    assert series[position["002"]] == series[position["003"]]
    assert series[position["031"]] != series[position["093"]]
