"""Titles state true facts of the SKU they belong to; head nouns, sizes and colours as labels."""

import re

import numpy as np
import pytest
from PIL import Image

from eclip.dataloading.demo.colours import colour_share, distinct
from eclip.dataloading.demo.products import CatalogProduct, CatalogSku, read_catalog
from eclip.dataloading.demo.titles import (
    _ALIKE,
    _HEADS,
    _NAMES,
    alike,
    attributes,
    dimensions,
    draw_title,
    head_noun,
    names_colour,
    product_name,
    size_bucket,
    titles_by_language,
    told_tags,
)

COLOURS = ["white", "black", "gray", "beige", "brown", "red", "orange", "yellow", "green", "blue", "purple", "pink"]


def sofa(**changes) -> CatalogProduct:
    sku = {"colour": "red", "recoloured": False, "size_cm": (190.0, 80.5, 85.2), "views": ()}
    skus = tuple(CatalogSku(sku=f"s-{c}", **{**sku, "colour": c}) for c in ("red", "blue"))
    facts = {
        "product": "s",
        "name": "Fabric sofa",
        "names": {"en": "Fabric sofa", "de": "Stoffsofa"},
        "category": "Living room",
        "tags": ("Blend Swap", "Couch"),
        "creator": "someone",
        "skus": skus,
    }
    return CatalogProduct(**{**facts, **changes})


def test_titles_state_only_true_facts() -> None:
    """Every word and number of every title is a fact of the SKU or one of the templates' few words."""
    for product in read_catalog():
        for sku in product.skus:
            facts = " ".join([product_name(product), product.category, *told_tags(product)]).lower()
            words = set(re.findall(r"[^\W\d_]+", facts)) | {"cm", "x", "in", "for", "the"}
            words |= {sku.colour} if sku.colour_seen else set()
            numbers = set(re.findall(r"[\d.]+", dimensions(sku.size_cm)))
            for seed in range(6):
                title = draw_title(product, sku, np.random.default_rng(seed)).lower()
                assert product_name(product).lower() in title
                assert set(re.findall(r"[^\W\d_]+", title)) <= words, title
                assert set(re.findall(r"\d+(?:\.\d+)?", title)) <= numbers, title


def test_titles_vary_in_template_and_fields() -> None:
    rng = np.random.default_rng(0)
    product = sofa()
    titles = [draw_title(product, product.skus[0], rng) for _ in range(400)]
    assert len(set(titles)) >= 20
    coloured = np.mean([names_colour(t, "red") for t in titles])
    sized = np.mean(["cm" in t for t in titles])
    assert 0.75 < coloured < 0.95 and 0.3 < sized < 0.7
    assert "Red fabric sofa, 190 cm" in titles and "fabric sofa | living room | red" in titles


def test_colour_is_told_only_when_seen() -> None:
    product = sofa()
    hidden = CatalogSku(sku="s", colour="red", recoloured=False, size_cm=(1, 1, 1), views=(), colour_seen=False)
    rng = np.random.default_rng(0)
    assert not any(names_colour(draw_title(product, hidden, rng), "red") for _ in range(50))


def test_titles_by_language() -> None:
    assert titles_by_language(sofa()) == {
        "en": "Fabric sofa, living room, 190 x 80 x 85 cm",
        "de": "Stoffsofa, 190 x 80 x 85 cm",
    }


@pytest.mark.parametrize(
    "name, noun",
    [
        ("Oak chair", "chair"),
        ("Chair with cushion", "chair"),
        ("Table with tablecloth", "table"),
        ("Couch", "sofa"),
        ("Shower head and faucet", "shower head"),
        ("Rigged fan", "fan"),
    ],
)
def test_head_noun(name: str, noun: str) -> None:
    assert head_noun(sofa(name=name)) == noun


def test_every_noun_of_a_like_group_exists() -> None:
    products = read_catalog()
    assert set().union(*_ALIKE) <= {head_noun(p) for p in products}
    assert _HEADS.keys() | _NAMES.keys() <= {p.name for p in products}
    assert alike("lamp", "lantern") and not alike("lamp", "bed")


def test_attributes() -> None:
    assert attributes(sofa()) == {
        "colour": "red",
        "colours": ["blue", "red"],
        "category": "Living room",
        "size": "very large",
        "type": "sofa",
    }
    sizes = {size_bucket((s, 1.0, 1.0)) for s in (5, 30, 60, 120, 300)}
    assert sizes == {"tiny", "small", "medium", "large", "very large"}


def test_colour_share() -> None:
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    half.paste((220, 20, 20, 255), (0, 0, 20, 40))
    half.paste((30, 60, 220, 255), (20, 0, 30, 40))
    assert colour_share([half], "red") == pytest.approx(2 / 3, abs=0.01)
    assert colour_share([half], "blue") == pytest.approx(1 / 3, abs=0.01)
    assert colour_share([half], "green") == 0
    assert {s.colour for p in read_catalog() for s in p.skus} == set(COLOURS)
    assert distinct("red", "blue") and not distinct("white", "gray") and not distinct("red", "red")
