"""A product's sample: what is composed, the same in every process, and the record that tells what one sees.

Every image of a product is drawn from a generator seeded by (seed, product, number of the image), so the shards do not
depend on how many processes draw them. Images alternate between the product's SKUs and, within a SKU, between the
three sources. Distractors come from the same split, never from the same series, and never make a title ambiguous.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from ..packing import Sample, image_name
from ..schema import SOURCES, ImageRecord, Product
from .colours import distinct
from .products import CatalogProduct, clear_views, load_view, read_catalog
from .scenes import Sprite, compose, num_distractors
from .split import near_identical, split_products
from .titles import (
    alike,
    attributes,
    draw_title,
    head_noun,
    names_colour,
    product_title,
    sku_facts,
    titles_by_language,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides what a product's sample looks like, the same in every process."""

    image_size: int
    seed: int
    images_per_product: int
    distractors: tuple[int, int]
    products: tuple[CatalogProduct, ...]
    catalog: tuple[str, ...]
    series: tuple[str, ...]
    sides: tuple[str, ...]


def make_plan(
    image_size: int, seed: int, images_per_product: int, distractors: tuple[int, int], limit: int | None
) -> Plan:
    """The plan of these arguments of `pack_demo`: catalogue entries, series and the split do not depend on the seed."""
    products = read_catalog()
    if limit is not None and limit < len(products):
        products = tuple(products[i * len(products) // limit] for i in range(limit))
    catalog, series = near_identical(products, lambda product: [load_view(name) for name in product.skus[0].views])
    return Plan(
        image_size=image_size,
        seed=seed,
        images_per_product=images_per_product,
        distractors=distractors,
        products=products,
        catalog=tuple(catalog),
        series=tuple(series),
        sides=tuple(split_products(products, series)),
    )


def _distractors(plan: Plan, p: int, title: str, colour: str, count: int, rng: np.random.Generator) -> list[Sprite]:
    """Draw SKUs of other products so that the title fits the titled product only.

    A product of a like type is let in only in a clearly different colour, when the title names the colour.
    """
    noun = head_noun(plan.products[p])
    coloured = names_colour(title, colour)
    sprites: list[Sprite] = []
    for q in rng.permutation(len(plan.products)):
        if len(sprites) == count:
            break
        other = plan.products[q]
        if plan.sides[q] != plan.sides[p] or plan.series[q] == plan.series[p]:
            continue
        skus = list(other.skus)
        if alike(head_noun(other), noun):
            skus = [s for s in skus if coloured and s.colour_seen and distinct(s.colour, colour)]
        if skus:
            sku = skus[int(rng.integers(len(skus)))]
            views = clear_views(sku)
            view = load_view(views[int(rng.integers(len(views)))])
            sprites.append(Sprite(product=other.product, sku=sku.sku, view=view))
    return sprites


def compose_product(plan: Plan, p: int) -> Sample:
    """Compose all images of product p and write its record."""
    product = plan.products[p]
    skus = product.skus[: max(1, plan.images_per_product // 2)]
    records, images = [], []
    for number in range(plan.images_per_product):
        rng = np.random.default_rng([plan.seed, zlib.crc32(product.product.encode()), number])
        sku = skus[number % len(skus)]
        source = SOURCES[(number // len(skus)) % len(SOURCES)]
        title = draw_title(product, sku, rng)
        views = clear_views(sku)
        view = load_view(views[int(rng.integers(len(views)))])
        count = num_distractors(source, rng, plan.distractors)
        others = _distractors(plan, p, title, sku.colour, count, rng)
        titled = Sprite(product=product.product, sku=sku.sku, view=view)
        data, instances = compose(source, [titled, *others], plan.image_size, rng)
        records.append(
            ImageRecord(
                file=image_name(number),
                source=source,
                sku=sku.sku,
                title=title,
                width=plan.image_size,
                height=plan.image_size,
                instances=instances,
            )
        )
        images.append(data)
    trained = {head_noun(plan.products[q]) for q in range(len(plan.products)) if plan.sides[q] == "train"}
    facts = attributes(product)
    return Product(
        key=product.product,
        product=product.product,
        title=product_title(product),
        category=product.category,
        catalog=plan.catalog[p],
        titles=titles_by_language(product),
        attributes=facts | {"unseen_type": facts["type"] not in trained, "series": plan.series[p]},
        skus={s.sku: sku_facts(s) for s in skus},
        images=tuple(records),
    ), images
