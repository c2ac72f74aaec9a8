"""The embedded catalogue: 172 real products (CC0) composed into train, val and test shards.

    python -m eclip.dataloading.demo --out data/demo

Every image of a product is drawn from a generator seeded by (seed, product, number of the image), so the shards do not
depend on how many processes draw them. Images alternate between the product's SKUs and, within a SKU, between the
three sources. Distractors come from the same split, never from the same series, and never make a title ambiguous.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import schema
from ..packing import shard_writer
from ..packing.shard_swap import own, refuse_foreign, replace_shards, require_finished, write_record
from ..packing.shard_writer import Sample, image_name, write_tars
from ..schema import SOURCES, ImageRecord, Product
from ..system.command import Parser, one_line_errors
from ..system.console import progress_bar, say
from ..system.parent import die_with_parent
from . import colours as demo_colours
from . import scenes as demo_scenes
from . import split as demo_split
from . import textures as demo_textures
from . import titles as demo_titles
from .scenes import DISTRACTORS, Sprite, compose, num_distractors
from .split import SPLITS, near_identical, split_products
from .titles import CatalogProduct, CatalogSku

ARCHIVE = Path(__file__).parent / "catalog" / "cc0_products.tar"
"""Views (cropped RGBA WebP, at most 192 px) and products.jsonl."""
_RECORD = "demo.json"
_MIN_ASPECT = 0.2
_FROM_BEHIND = (1, 5, 9)  # positions of the rear views of every SKU: nobody shows the back of a cabinet


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
        seen = demo_colours.colour_share([_view(name) for name in row["views"][:5:2]], row["colour"])
        sku = CatalogSku(
            sku=row["sku"],
            colour=row["colour"],
            recoloured=row["recoloured"],
            size_cm=(width, depth, height),
            views=tuple(row["views"]),
            colour_seen=seen >= demo_colours.SEEN,
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


@dataclass(frozen=True, kw_only=True)
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
    """Views neither from behind nor edge-on (a ruler from its end); the three widest when all are narrow."""
    views = [name for position, name in enumerate(sku.views) if position not in _FROM_BEHIND]
    aspect = {name: min(_view(name).size) / max(_view(name).size) for name in views}
    clear = [name for name in views if aspect[name] >= _MIN_ASPECT]
    return clear if len(clear) >= 3 else sorted(views, key=lambda name: -aspect[name])[:3]


def _distractors(plan: _Plan, p: int, title: str, colour: str, count: int, rng: np.random.Generator) -> list[Sprite]:
    """Draw SKUs of other products so that the title fits the titled product only.

    A product of a like type is let in only in a clearly different colour, when the title names the colour.
    """
    noun = demo_titles.head_noun(plan.products[p])
    coloured = demo_titles.names_colour(title, colour)
    sprites: list[Sprite] = []
    for q in rng.permutation(len(plan.products)):
        if len(sprites) == count:
            break
        other = plan.products[q]
        if plan.sides[q] != plan.sides[p] or plan.series[q] == plan.series[p]:
            continue
        skus = list(other.skus)
        if demo_titles.alike(demo_titles.head_noun(other), noun):
            skus = [s for s in skus if coloured and s.colour_seen and demo_colours.distinct(s.colour, colour)]
        if skus:
            sku = skus[int(rng.integers(len(skus)))]
            views = _clear_views(sku)
            sprites.append(Sprite(product=other.product, sku=sku.sku, view=_view(views[int(rng.integers(len(views)))])))
    return sprites


def _compose_product(plan: _Plan, p: int) -> Sample:
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
    for number in (signal.SIGINT, signal.SIGHUP):  # these reach the whole group; the parent ends the pool
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    _plan = plan


def _work(p: int) -> Sample:
    assert _plan is not None
    return _compose_product(_plan, p)


def fingerprint(
    image_size: int, seed: int, images_per_product: int, distractors: tuple[int, int], limit: int | None
) -> str:
    """Hash of the arguments, the archive and the code that composes: equal fingerprints, equal shards."""
    sha = hashlib.sha256(repr((image_size, seed, images_per_product, tuple(distractors), limit)).encode())
    sha.update(ARCHIVE.read_bytes())
    for module in (demo_colours, demo_scenes, demo_split, demo_textures, demo_titles, schema, shard_writer):
        sha.update(Path(str(module.__file__)).read_bytes())
    sha.update(Path(__file__).read_bytes())
    return sha.hexdigest()[:16]


def _up_to_date(data_dir: Path, expected: str) -> bool:
    try:
        record = json.loads((data_dir / _RECORD).read_text(encoding="utf-8"))
        if record["fingerprint"] != expected:
            return False
        require_finished(data_dir)
        return all((data_dir / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _validate(
    image_size: int, seed: int, images_per_product: int, distractors: tuple[int, int], limit: int | None, workers: int
) -> None:
    if not 32 <= image_size <= 512:
        raise ValueError(f"image_size={image_size} is out of range: the views have 192 px; choose 32 to 512")
    if images_per_product < 2:
        raise ValueError(
            f"images_per_product={images_per_product}: pairs need images of two sources; choose at least 2"
        )
    if not 0 <= distractors[0] <= distractors[1] <= 6:
        raise ValueError(f"distractors={distractors}: expected two numbers, 0 <= low <= high <= 6")
    if limit is not None and limit < 20:
        raise ValueError(f"limit={limit}: fewer than 20 products leave a split without distractors")
    if seed < 0:
        raise ValueError(f"seed={seed}: choose at least 0")
    if workers < 1:
        raise ValueError(f"workers={workers}: choose at least 1")


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

    image_size: side of the square JPEGs, pixels. images_per_product: spread over SKUs and sources; SKUs that would get
    fewer than two are left out. distractors: least and most other products in a customer photo. limit: only so many
    products of the catalogue, evenly spaced (for tests). workers: processes, by default one a core; the shards do not
    depend on their number. Like every program that starts processes, a script calling this with more than one worker
    needs an `if __name__ == "__main__":` guard. Waits while another packing is at work there; shards that it replaces
    stay until the new ones are complete. Raises ValueError for settings out of range, for a folder that cannot be
    written or holds tars of another origin, also a packed catalogue of one's own, and when the disk is full.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _validate(image_size, seed, images_per_product, distractors, limit, workers)
    expected = fingerprint(image_size, seed, images_per_product, distractors, limit)
    if _up_to_date(data_dir, expected):
        return
    plan = _make_plan(image_size, seed, images_per_product, distractors, limit)
    with own(data_dir, wait=True):
        if not _up_to_date(data_dir, expected):  # another run may have packed while this one waited
            refuse_foreign(data_dir, (_RECORD,))  # a user's own catalogue is not replaced by this one
            _pack(data_dir, plan, expected, workers, progress)


def _make_plan(
    image_size: int, seed: int, images_per_product: int, distractors: tuple[int, int], limit: int | None
) -> _Plan:
    products = read_catalog()
    if limit is not None and limit < len(products):
        products = tuple(products[i * len(products) // limit] for i in range(limit))
    catalog, series = near_identical(products, lambda product: [_view(name) for name in product.skus[0].views])
    return _Plan(
        image_size=image_size,
        seed=seed,
        images_per_product=images_per_product,
        distractors=distractors,
        products=products,
        catalog=tuple(catalog),
        series=tuple(series),
        sides=tuple(split_products(products, series)),
    )


def _pack(data_dir: Path, plan: _Plan, expected: str, workers: int, progress: bool) -> None:
    total = plan.images_per_product * len(plan.products)
    with replace_shards(data_dir) as folder:
        with (
            _workers(workers, plan) as compose_all,
            progress_bar(total, unit="img", desc="composing", disable=not progress) as bar,
        ):
            for split in SPLITS:
                positions = [p for p, side in enumerate(plan.sides) if side == split]
                write_tars(_counted(compose_all(positions), bar), folder, split)
        facts = {
            "fingerprint": expected,
            "image_size": plan.image_size,
            "seed": plan.seed,
            "images_per_product": plan.images_per_product,
            "distractors": list(plan.distractors),
            "products": {split: plan.sides.count(split) for split in SPLITS},
        }
        write_record(folder, _RECORD, facts)


def _counted(samples: Iterable[Sample], bar: "tqdm[None]") -> Iterator[Sample]:
    for product, images in samples:
        bar.update(len(images))
        yield product, images


@contextlib.contextmanager
def _workers(workers: int, plan: _Plan) -> Iterator[Callable[[list[int]], Iterable[Sample]]]:
    """Yield a function that composes products in order, here or in `workers` processes."""
    if workers == 1:
        yield lambda positions: (_compose_product(plan, p) for p in positions)
        return
    # spawn: torch may already run threads here, and a forked copy of those can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(plan,))
    try:
        yield lambda positions: pool.map(_work, positions)
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {workers} composing processes was killed (the machine's memory may be full); try fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `pack_demo`."""
    parser = Parser(
        prog="python -m eclip.dataloading.demo",
        description="Write the embedded catalogue (172 CC0 products) as train, val and test shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/demo"), help="folder of the shards")
    add("--image-size", type=int, default=160, help="side of the images, pixels")
    add("--seed", type=int, default=0, help="seed of scenes and titles; the split is fixed")
    add("--images-per-product", type=int, default=40, help="images of each product")
    add("--distractors", type=int, nargs=2, default=DISTRACTORS, help="least and most products beside the titled one")
    add("--limit", type=int, help="only so many products")
    add("--workers", type=int, help="processes, one a core when not given")
    add("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        pack_demo(
            args.out,
            image_size=args.image_size,
            seed=args.seed,
            images_per_product=args.images_per_product,
            distractors=tuple(args.distractors),
            limit=args.limit,
            workers=args.workers,
            progress=not args.no_progress,
        )
        record = json.loads((args.out / _RECORD).read_text(encoding="utf-8"))
        counts = ", ".join(f"{split} {n}" for split, n in record["products"].items())
        say(f"{args.out}: products {counts}; {sum(record['files'].values()) / 2**20:.0f} MiB of shards")
