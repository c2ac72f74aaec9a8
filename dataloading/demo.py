"""The embedded catalogue: 172 real products (CC0) composed into train, val and test shards.

    python -m eclip.dataloading.demo --out data/demo

Every image of a product is drawn from a generator seeded by (seed, product, number of the image), so the shards do not
depend on how many processes draw them. Images alternate between the product's SKUs and, within a SKU, between the
three sources. Distractors come from the same split, never from the same series, and never make a title ambiguous.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import demo_scenes, demo_split, demo_textures, demo_titles, pack, schema
from .demo_scenes import DISTRACTORS, Sprite, compose, num_distractors
from .demo_split import SPLITS, near_identical, split_products
from .demo_titles import CatalogProduct, CatalogSku
from .schema import SOURCES, ImageRecord, Product

ARCHIVE = Path(__file__).parent / "demo_catalog" / "cc0_products.tar"
"""Views (cropped RGBA WebP, at most 192 px) and products.jsonl."""
_RECORD = "demo.json"
_MIN_ASPECT = 0.2


@cache
def _archive() -> dict[str, bytes]:
    with tarfile.open(ARCHIVE) as tar:
        return {m.name: stream.read() for m in tar if m.isfile() and (stream := tar.extractfile(m)) is not None}


@cache
def _view(name: str) -> Image.Image:
    return Image.open(io.BytesIO(_archive()[name])).convert("RGBA")


@cache
def read_catalog() -> tuple[CatalogProduct, ...]:
    """The products of the archive in its order, SKUs grouped, the original colour first."""
    products: dict[str, CatalogProduct] = {}
    for line in _archive()["products.jsonl"].decode().splitlines():
        row = json.loads(line)
        width, depth, height = row["size_cm"]
        sku = CatalogSku(
            sku=row["sku"],
            colour=row["colour"],
            recoloured=row["recoloured"],
            size_cm=(width, depth, height),
            views=tuple(row["views"]),
        )
        known = products.get(row["product"])
        products[row["product"]] = CatalogProduct(
            product=row["product"],
            name=row["name"],
            names=row["names"],
            category=row["category"],
            tags=tuple(row["tags"]),
            creator=row["creator"],
            skus=(*known.skus, sku) if known else (sku,),
        )
    return tuple(products.values())


@dataclass(frozen=True)
class _Plan:
    """Everything that decides what a product's sample looks like, the same in every process."""

    image_size: int
    seed: int
    images_per_product: int
    distractors: tuple[int, int]
    products: tuple[CatalogProduct, ...]
    catalog: tuple[str, ...]
    series: tuple[str, ...]
    sides: tuple[str, ...]


def _clear_views(sku: CatalogSku) -> list[str]:
    """Views that are not seen edge-on (a ruler from its end), or the three widest when all are."""
    aspect = {name: min(_view(name).size) / max(_view(name).size) for name in sku.views}
    clear = [name for name in sku.views if aspect[name] >= _MIN_ASPECT]
    return clear if len(clear) >= 3 else sorted(sku.views, key=lambda name: -aspect[name])[:3]


def _distractors(plan: _Plan, p: int, title: str, colour: str, count: int, rng: np.random.Generator) -> list[Sprite]:
    """Draw SKUs of other products so that the title fits the titled product only.

    A product of the same type is let in only in another colour, and only when the title names the colour.
    """
    noun, coloured = demo_titles.head_noun(plan.products[p]), demo_titles.names_colour(title, colour)
    sprites: list[Sprite] = []
    for q in rng.permutation(len(plan.products)):
        if len(sprites) == count:
            break
        other = plan.products[q]
        if plan.sides[q] != plan.sides[p] or plan.series[q] == plan.series[p]:
            continue
        skus = list(other.skus)
        if demo_titles.head_noun(other) == noun:
            skus = [s for s in skus if coloured and s.colour != colour]
        if skus:
            sku = skus[int(rng.integers(len(skus)))]
            views = _clear_views(sku)
            sprites.append(Sprite(product=other.product, sku=sku.sku, view=_view(views[int(rng.integers(len(views)))])))
    return sprites


def _sample(plan: _Plan, p: int) -> tuple[Product, list[bytes]]:
    """Compose all images of product p and write its record."""
    product = plan.products[p]
    skus = product.skus[: max(1, plan.images_per_product // 2)]
    records, images = [], []
    for number in range(plan.images_per_product):
        rng = np.random.default_rng([plan.seed, zlib.crc32(product.product.encode()), number])
        sku = skus[number % len(skus)]
        source = SOURCES[(number // len(skus)) % len(SOURCES)]
        title = demo_titles.draw_title(product, sku, rng)
        views = _clear_views(sku)
        view = _view(views[int(rng.integers(len(views)))])
        count = num_distractors(source, rng, plan.distractors)
        others = _distractors(plan, p, title, sku.colour, count, rng)
        data, instances = compose(source, [Sprite(product=product.product, sku=sku.sku, view=view), *others], plan.image_size, rng)
        records.append(
            ImageRecord(
                file=pack.image_name(number),
                source=source,
                sku=sku.sku,
                title=title,
                width=plan.image_size,
                height=plan.image_size,
                instances=instances,
            )
        )
        images.append(data)
    trained = {demo_titles.head_noun(plan.products[q]) for q in range(len(plan.products)) if plan.sides[q] == "train"}
    facts = demo_titles.attributes(product)
    return Product(
        key=product.product,
        product=product.product,
        title=demo_titles.product_title(product),
        category=product.category,
        catalog=plan.catalog[p],
        titles=demo_titles.titles_by_language(product),
        attributes=facts | {"unseen_type": facts["type"] not in trained, "series": plan.series[p]},
        skus={s.sku: demo_titles.sku_facts(s) for s in skus},
        images=tuple(records),
    ), images


_plan: _Plan | None = None


def _start_worker(plan: _Plan) -> None:
    global _plan
    _plan = plan


def _work(p: int) -> tuple[Product, list[bytes]]:
    assert _plan is not None
    return _sample(_plan, p)


def fingerprint(image_size: int, seed: int, images_per_product: int, distractors: tuple[int, int], limit: int | None) -> str:
    """Hash of the arguments, the archive and the code that composes: equal fingerprints, equal shards."""
    sha = hashlib.sha256(repr((image_size, seed, images_per_product, tuple(distractors), limit)).encode())
    sha.update(ARCHIVE.read_bytes())
    for module in (demo_scenes, demo_split, demo_textures, demo_titles, pack, schema):
        sha.update(Path(str(module.__file__)).read_bytes())
    sha.update(Path(__file__).read_bytes())
    return sha.hexdigest()[:16]


def _up_to_date(data_dir: Path, print_: str) -> bool:
    try:
        record = json.loads((data_dir / _RECORD).read_text())
    except (OSError, ValueError):
        return False
    sizes = record.get("files", {})
    return record.get("fingerprint") == print_ and all(
        (data_dir / name).is_file() and (data_dir / name).stat().st_size == size for name, size in sizes.items()
    )


def _validate(image_size: int, images_per_product: int, distractors: tuple[int, int], limit: int | None, workers: int) -> None:
    if not 32 <= image_size <= 512:
        raise ValueError(f"image_size={image_size}: the views have 192 px; choose 32..512")
    if images_per_product < 2:
        raise ValueError(f"images_per_product={images_per_product}: training pairs need images of two sources, at least 2")
    if not 0 <= distractors[0] <= distractors[1] <= 6:
        raise ValueError(f"distractors={distractors}: expected 0 <= low <= high <= 6")
    if limit is not None and limit < 20:
        raise ValueError(f"limit={limit}: fewer than 20 products leave a split empty")
    if workers < 1:
        raise ValueError(f"workers={workers}: at least 1")


def _composed(plan: _Plan, split: str, workers: int, bar: "tqdm[None]", pool: "multiprocessing.pool.Pool | None") -> Iterator[tuple[Product, list[bytes]]]:
    positions = [p for p, side in enumerate(plan.sides) if side == split]
    samples = map(lambda p: _sample(plan, p), positions) if pool is None else pool.imap(_work, positions)
    for product, images in samples:
        bar.update(len(images))
        yield product, images


def pack_demo(
    data_dir: Path,
    *,
    image_size: int = 160,
    seed: int = 0,
    images_per_product: int = 40,
    distractors: tuple[int, int] = DISTRACTORS,
    limit: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write train, val and test shards of the embedded catalogue unless they are there already.

    image_size: side of the square JPEGs, pixels. images_per_product: spread over SKUs and sources; with fewer than two a
    SKU, SKUs are left out. distractors: least and most other products in a customer photo. limit: the first so many products
    of the catalogue only (tests). workers: processes, default the cores this process may use. The shards do not depend
    on workers. Raises ValueError for settings out of range.
    """
    workers = workers or max(1, len(os.sched_getaffinity(0)))
    _validate(image_size, images_per_product, distractors, limit, workers)
    print_ = fingerprint(image_size, seed, images_per_product, distractors, limit)
    if _up_to_date(data_dir, print_):
        return
    data_dir.mkdir(parents=True, exist_ok=True)
    (data_dir / _RECORD).unlink(missing_ok=True)
    products = read_catalog()[:limit]
    catalog, series = near_identical(products, lambda product: [_view(name) for name in product.skus[0].views])
    sides = split_products(products, series)
    plan = _Plan(image_size, seed, images_per_product, distractors, products, tuple(catalog), tuple(series), tuple(sides))

    files: dict[str, int] = {}
    pool = None
    if workers > 1:
        # spawn: torch may already run threads here, and a forked copy of those can hang.
        pool = multiprocessing.get_context("spawn").Pool(workers, initializer=_start_worker, initargs=(plan,))
    try:
        with tqdm(total=images_per_product * len(products), unit="img", desc=f"composing {data_dir}", disable=not progress) as bar:
            for split in SPLITS:
                tars = pack.write_shards(_composed(plan, split, workers, bar, pool), data_dir, split)
                files |= {t.name: t.stat().st_size for t in tars}
    finally:
        if pool is not None:
            pool.terminate()
            pool.join()
    record = {
        "fingerprint": print_,
        "image_size": image_size,
        "seed": seed,
        "images_per_product": images_per_product,
        "distractors": list(distractors),
        "products": {split: sides.count(split) for split in SPLITS},
        "files": files,
    }
    part = data_dir / f"{_RECORD}.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(data_dir / _RECORD)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `pack_demo`."""
    parser = argparse.ArgumentParser(prog="python -m eclip.dataloading.demo", description="Write the embedded catalogue as shards.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder of the shards (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=160, help="side of the images, pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and titles; the split is fixed (default: %(default)s)")
    parser.add_argument("--images-per-product", type=int, default=40, help="images of each product (default: %(default)s)")
    parser.add_argument("--distractors", type=int, nargs=2, metavar=("LOW", "HIGH"), default=DISTRACTORS, help="other products in a customer photo (default: 2 6)")
    parser.add_argument("--limit", type=int, default=None, help="only the first N products (default: all 172)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    a = parser.parse_args(argv)
    try:
        pack_demo(
            a.out,
            image_size=a.image_size,
            seed=a.seed,
            images_per_product=a.images_per_product,
            distractors=tuple(a.distractors),
            limit=a.limit,
            workers=a.workers,
            progress=not a.no_progress,
        )
    except ValueError as error:
        parser.error(str(error))
    record = json.loads((a.out / _RECORD).read_text())
    print(f"{a.out}: {record['products']} products, {sum(record['files'].values()) / 2**20:.0f} MiB, fingerprint {record['fingerprint']}")


if __name__ == "__main__":
    main()
