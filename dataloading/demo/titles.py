"""Facts of a catalogue product and the ways they are told: titles, titles by language, attributes.

Every title states facts that hold for the SKU it belongs to (name, colour, size, tags, category) and nothing else; a
title uses a random subset of them in a random template, as titles of one product by different sellers do.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from .products import CatalogProduct, CatalogSku

# Names that speak of the 3D file ("rigged" for animation) or are no English; the rest are used as they are.
_NAMES = {
    "Rigged fan": "Fan",
    "Locked locker": "Locker",
    "Toilets unit": "Toilet",
    "Child hut": "Playground hut",
    "Motorbike": "Spring motorbike",
}
# English puts the head last ("oak chair"), except here.
_HEADS = {
    "Shower head and faucet": "shower head",
    "Hot dog": "hot dog",
    "Cup cake": "cup cake",
    "Rocking horse": "rocking horse",
    "Fork lift": "fork lift",
    "White board": "white board",
    "Apple iPhone": "phone",
    "Wall light": "lamp",
    "Couch": "sofa",
    "Large fridge": "refrigerator",
    "Wardrobe": "cupboard",
    "Bookcase": "shelves",
    "Crate": "box",
    "Flacon": "bottle",
    "Island extension": "island",
}
# Names of types that one may call by each other's name: such a product is a distractor only in another colour.
_ALIKE = (
    {"chair", "armchair", "stool", "sofa", "bench"},
    {"cabinet", "cupboard", "shelves", "vanity", "island", "locker", "refrigerator", "oven", "desk", "piano"},
    {"table", "desk", "island", "stand", "bench", "stool"},
    {"oven", "cooktop", "stove", "hood"},
    {"plant", "cactus", "orchids", "box"},
    {"box", "barrel", "container", "briefcase", "pallet"},
    {"cup", "glass", "bottle", "pot", "milk"},
    {"lamp", "lantern"},
    {"toilet", "urinal", "bidet", "washbasin", "potty"},
    {"railing", "fence", "white board", "door", "tatami", "radiator"},
    {"shower head", "stall", "door"},
    {"towel", "rack"},
    {"seesaw", "swing", "hut", "motorbike", "rocking horse"},
    {"bear", "toy", "deer", "rocking horse"},
    {"slippers", "bootie"},
    {"handbag", "briefcase"},
    {"bread", "cup cake", "hot dog", "butter"},
    {"tv", "white board", "sign"},
)
_ADJECTIVES = {"Osaka", "Winchester", "Japanese"}
# "Blend Swap" is where the model came from; the others repeat the category or are wrong for the object seen.
_NOT_TOLD = {"blend swap", "outdoor", "adjustable"}
_BUCKETS = ((12.0, "tiny"), (40.0, "small"), (90.0, "medium"), (160.0, "large"), (float("inf"), "very large"))
_ROOMS = {"Living room", "Kitchen", "Bedroom", "Bathroom", "Office"}


def product_name(product: CatalogProduct) -> str:
    """The English name as shops would print it."""
    return _NAMES.get(product.name, product.name)


def head_noun(product: CatalogProduct) -> str:
    """What kind of thing it is, in lower case: "Oak chair" -> "chair", "Table with tablecloth" -> "table"."""
    if product.name in _HEADS:
        return _HEADS[product.name]
    return product_name(product).split(" with ")[0].split()[-1].lower()


def alike(a: str, b: str) -> bool:
    """Whether two head nouns are equal or close enough that a title with one could be taken for the other."""
    return a == b or any(a in group and b in group for group in _ALIKE)


def size_bucket(size_cm: tuple[float, float, float]) -> str:
    """tiny (< 12 cm), small (< 40), medium (< 90), large (< 160), very large, by the longest side."""
    return next(name for limit, name in _BUCKETS if max(size_cm) < limit)


def told_tags(product: CatalogProduct) -> list[str]:
    """Tags that say something about the product, in lower case, without those already in its name or category."""
    said = (product_name(product) + " " + product.category).lower()
    return [t.lower() for t in product.tags if t.lower() not in _NOT_TOLD and t.lower() not in said]


def _centimetres(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")


def dimensions(size_cm: tuple[float, float, float]) -> str:
    """Width x depth x height: "59 x 63 x 105 cm"."""
    return " x ".join(_centimetres(v) for v in size_cm) + " cm"


def longest_side(size_cm: tuple[float, float, float]) -> str:
    """The longest side: "105 cm"."""
    return f"{_centimetres(max(size_cm))} cm"


def _running_text(name: str) -> str:
    """The name as it stands inside a sentence: lower case but for "iPhone", "TV" and adjectives of places."""
    words = name.split()
    kept = (w if w in _ADJECTIVES or any(c.isupper() for c in w[1:]) else w.lower() for w in words)
    return " ".join("Apple" if w == "apple" else w for w in kept)


def draw_title(product: CatalogProduct, sku: CatalogSku, rng: np.random.Generator) -> str:
    """A title of one SKU: always its name, mostly its colour (if seen), often a size, a tag or the category."""
    name, low = product_name(product), _running_text(product_name(product))
    colour = sku.colour
    size = dimensions(sku.size_cm) if rng.random() < 0.4 else longest_side(sku.size_cm)
    tags = told_tags(product)
    tag = tags[int(rng.integers(len(tags)))] if tags else ""
    field = product.category.lower() if product.category != "Miscellaneous" else tag
    plain = [name, f"{name}, {size}", f"{name} {size}"]
    coloured = [
        f"{colour.capitalize()} {low}",
        f"{colour.capitalize()} {low}, {size}",
        f"{name}, {colour}, {size}",
        f"{name} in {colour}",
        f"{name} - {colour} - {size}",
        f"{name} {size} {colour}",
    ]
    if tag:
        plain.append(f"{name} ({tag}), {size}")
        coloured += [f"{low} | {tag} | {colour} | {size}", f"{name} ({colour}), {tag}"]
    if field:
        plain += [f"{low} | {field} | {size}", f"{field.capitalize()}: {low}"]
        coloured += [f"{low} | {field} | {colour}", f"{field.capitalize()}: {colour} {low}, {size}"]
    if product.category in _ROOMS:
        plain.append(f"{name} for the {field}")
        coloured += [f"{colour.capitalize()} {low} for the {field}", f"{name} for the {field}, {colour}, {size}"]
    templates = coloured if sku.colour_seen and rng.random() < 0.85 else plain
    return templates[int(rng.integers(len(templates)))]


def names_colour(title: str, colour: str) -> bool:
    """Whether a title tells the colour."""
    return re.search(rf"\b{re.escape(colour)}\b", title, re.IGNORECASE) is not None


def product_title(product: CatalogProduct) -> str:
    """The title that holds for every SKU: name, category, size, no colour."""
    category = f", {product.category.lower()}" if product.category != "Miscellaneous" else ""
    return f"{product_name(product)}{category}, {dimensions(product.skus[0].size_cm)}"


def titles_by_language(product: CatalogProduct) -> dict[str, str]:
    """The catalogue's names in its 21 languages, each with the size, which needs no translation."""
    size = dimensions(product.skus[0].size_cm)
    return {language: f"{name}, {size}" for language, name in product.names.items()} | {"en": product_title(product)}


def attributes(product: CatalogProduct) -> dict[str, Any]:
    """Facts as labels: colour of the original ("other" if not seen), all colours, category, size bucket, type."""
    seen = [s.colour if s.colour_seen else "other" for s in product.skus]
    return {
        "colour": seen[0],
        "colours": sorted(set(seen)),
        "category": product.category,
        "size": size_bucket(product.skus[0].size_cm),
        "type": head_noun(product),
    }


def sku_facts(sku: CatalogSku) -> dict[str, Any]:
    """What `Product.skus` keeps of one SKU."""
    facts = dataclasses.asdict(sku)
    del facts["views"], facts["sku"]
    return facts | {"size": size_bucket(sku.size_cm)}
