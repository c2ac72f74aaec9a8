"""Evaluate one run on one split: every task whose facts the catalogue has, a JSON, tables, a sheet of overlays."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from eclip.config import RunConfig
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.schema import ImageRecord, Product
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import WordPiece
from eclip.evaluate.boxes import pixel_map, region_box
from eclip.evaluate.features import Features, decoder_is_trained, extract_features
from eclip.evaluate.inputs import Catalogue, NoSplit, check_numbers, choose_device
from eclip.evaluate.report.lettering import WAY_OUT
from eclip.evaluate.report.sheet import Overlay, draw_sheet
from eclip.evaluate.report.tables import Table, format_table
from eclip.evaluate.tasks.classification import class_features, classify
from eclip.evaluate.tasks.grounding import (
    DEFAULT_THRESHOLD,
    Scene,
    can_ground,
    choose_thresholds,
    grounding_table,
    make_scene,
    score_scenes,
)
from eclip.evaluate.tasks.image_text_loss import image_text_loss
from eclip.evaluate.tasks.image_text_retrieval import image_text_retrieval
from eclip.evaluate.tasks.product_retrieval import product_retrieval
from eclip.files import replace_text, writing
from eclip.model.eclip import ECLIP
from eclip.training.checkpoint import load_run
from eclip.training.feature_cache.cache import FeatureCache, cache_folder
from eclip.training.feature_cache.file import CannotStore

NUM_OVERLAYS = 12


@dataclass(kw_only=True)
class Evaluator:
    """A loaded model and how to run it."""

    model: ECLIP
    config: RunConfig
    tokenizer: WordPiece
    catalogue: Catalogue
    device: torch.device
    batch_size: int = 64
    cache_dir: Path | None = None
    """With a locked image tower: read its outputs from, or first write them to, this folder (float16)."""
    cache_is_wanted: bool = False
    """The user named cache_dir: it is an error when it cannot be written, else the outputs are computed each time."""
    progress: bool = True

    def open_cache(self, index: ShardIndex) -> FeatureCache | None:
        if self.cache_dir is None or not self.config.lock_image:
            return None
        try:
            return FeatureCache.build_or_open(
                self.cache_dir,
                self.model,
                index,
                self.tokenizer,
                self.config,
                device=self.device,
                progress=self.progress,
            )
        except CannotStore as error:
            if self.cache_is_wanted:
                raise
            print(f"not cached, computed for this evaluation alone: {error}")
            return None

    def features(self, index: ShardIndex, rows: NDArray[np.int64], label: str) -> tuple[Features, list[str]]:
        return extract_features(
            self.model,
            index,
            self.tokenizer,
            self.config,
            rows,
            device=self.device,
            batch_size=self.batch_size,
            cache=self.open_cache(index),
            progress=self.progress,
            label=label,
        )


def evaluate_run(
    run_dir: Path,
    device: torch.device | str = "cpu",
    *,
    data_dir: Path | None = None,
    split: str = "test",
    batch_size: int = 64,
    limit: int | None = None,
    threshold: float | Literal["auto"] = "auto",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate the newest weights of `run_dir` on a split; print the tables.

    data_dir: the catalogue, where it is not the one at the place that the run recorded (see inputs.py). limit: take
    only so many products, evenly spread. threshold: cuts the score maps into regions; "auto" takes the
    best of a small grid on the VAL split. cache_dir: see Evaluator; a run trained with --cache-features has one anyway.
    Writes RUN/evaluation.json and, where boxes are known, RUN/grounding.png
    (another split than test: evaluation-SPLIT.json, grounding-SPLIT.png). Returns what the JSON holds:
    result["tables"][task]["rows"][row][metric], in [0, 1] unless the table's unit is nats, None where undefined.
    Raises ValueError when there is no run, when its data is missing or other than it was, when features are not finite,
    and, after the tables are printed, when the files cannot be written.
    """
    run_dir = Path(run_dir)
    check_numbers(batch_size, limit, threshold)
    device = choose_device(device)
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir}: no run here (config.json is missing); give the --run-dir that training wrote")
    began = time.monotonic()
    model, config, tokenizer = load_run(run_dir, device)
    catalogue = Catalogue.of_run(run_dir, config, data_dir)
    config = replace(config, data=replace(config.data, data_dir=catalogue.folder))
    index = catalogue.open(split)
    evaluator = Evaluator(
        model=model,
        config=config,
        tokenizer=tokenizer,
        catalogue=catalogue,
        device=device,
        batch_size=batch_size,
        cache_dir=cache_folder(config) if cache_dir is None and config.cache_features else cache_dir,
        cache_is_wanted=cache_dir is not None,
        progress=progress,
    )
    suffix = "" if split == "test" else f"-{split}"
    tables, skipped, counts, overlays = evaluate_split(evaluator, index, split=split, limit=limit, threshold=threshold)
    result = {
        "run_dir": str(run_dir),
        "split": split,
        "data": {"data_dir": str(catalogue.folder), "fingerprint": index.fingerprint, "notes": catalogue.notes},
        **counts,
        "decoder_trained": decoder_is_trained(config),
        "seconds": round(time.monotonic() - began, 1),
        "tables": {name: table.to_dict() for name, table in tables.items()},
        "skipped": skipped,
    }
    path, sheet = run_dir / f"evaluation{suffix}.json", run_dir / f"grounding{suffix}.png"
    try:
        _print_tables(result, tables, skipped)
    finally:  # also when nobody reads what is printed (`| head`)
        replace_text(path, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if overlays and (note := draw_sheet(overlays, sheet)):
        print(f"\n{sheet}: {note}; {WAY_OUT}")
    if not overlays and sheet.exists():
        with writing(sheet):
            sheet.unlink()  # of an earlier evaluation: beside these numbers it would be taken for theirs
    print(f"\nwritten: {path}" + (f", {sheet}" if overlays else ""))
    return result


def _print_tables(result: dict[str, Any], tables: dict[str, Table], skipped: dict[str, str]) -> None:
    size = f"{result['products']} products, {result['images']} images"
    print(f"\n{result['run_dir']}: {result['split']} split, {size}; numbers in %, losses in nats\n")
    for note in result["data"]["notes"]:
        print(f"note: {note}\n")
    if not result["decoder_trained"]:
        print("instance rows: absent, this run trained no instance decoder\n")
    print("\n\n".join(format_table(table) for table in tables.values()))
    for name, reason in skipped.items():
        print(f"\nskipped {name}: {reason}")


def evaluate_split(
    evaluator: Evaluator,
    index: ShardIndex,
    *,
    split: str,
    limit: int | None,
    threshold: float | Literal["auto"],
) -> tuple[dict[str, Table], dict[str, str], dict[str, Any], list[Overlay]]:
    """All tasks on one opened split: tables, reasons of the skipped tasks, counts, overlays of some images."""
    rows = choose_rows(index, limit)
    features, corrupt = evaluator.features(index, rows, f"{split} features")
    for line in corrupt:
        print(f"left out, not decodable: {line}")
    facts = {int(p): index.product(int(p)) for p in np.unique(features.products)}
    of_image = [facts[int(p)] for p in features.products]
    tables: dict[str, Table] = {}
    skipped: dict[str, str] = {}

    def add(name: str, outcome: Table | str) -> None:
        if isinstance(outcome, str):
            skipped[name] = outcome
        else:
            tables[name] = outcome

    for name, outcome in classification(evaluator, features, of_image):
        add(name, outcome)
    tables |= image_text_retrieval(features)
    add("image_text_loss", image_text_loss(features, evaluator.model.scale()))

    categories = index.category_ids[features.products]
    unseen = np.array([bool(product.attributes.get("unseen_type")) for product in of_image])
    fine = "product retrieval, same product"
    add("product_retrieval", product_retrieval(features, features.products, title=fine))
    unseen_only = "products whose head noun was not in training"
    if unseen.any():
        title = f"{fine}, {unseen_only}"
        add("product_retrieval_unseen_type", product_retrieval(features, features.products, title=title, keep=unseen))
    add("product_retrieval_coarse", product_retrieval(features, categories, title="product retrieval, same category"))
    overlays: list[Overlay] = []
    for name, outcome in grounding(evaluator, index, features, facts, split, threshold, overlays):
        add(name, outcome)
    counts = {"products": len(facts), "images": len(features), "corrupt": corrupt}
    return tables, skipped, counts, overlays


def choose_rows(index: ShardIndex, limit: int | None) -> NDArray[np.int64]:
    """All images, or those of `limit` products spread evenly over the split."""
    count = index.num_products if limit is None else min(limit, index.num_products)
    products = np.unique(np.linspace(0, index.num_products - 1, count).round().astype(np.int64))
    starts = index.image_start
    return np.concatenate([np.arange(starts[p], starts[p + 1]) for p in products]).astype(np.int64)


def classification(
    evaluator: Evaluator, features: Features, of_image: list[Product]
) -> Iterator[tuple[str, Table | str]]:
    """Category and, where attributes have it, type (head noun), among the names that occur in these images."""
    kinds = {
        "category": [product.category for product in of_image],
        "type": [str(product.attributes.get("type") or "") for product in of_image],
    }
    for kind, found in kinds.items():
        names = sorted(set(found) - {""})
        if len(names) < 2:
            yield f"classification_{kind}", f"{len(names)} different {kind} names in this split, at least 2 are needed"
            continue
        classes = class_features(
            evaluator.model,
            evaluator.tokenizer,
            names,
            max_tokens=evaluator.config.data.max_tokens,
            device=evaluator.device,
        )
        labels = np.array([names.index(name) if name else -1 for name in found])
        yield f"classification_{kind}", classify(features, classes, labels, title=f"zero-shot {kind}")


def grounding(
    evaluator: Evaluator,
    index: ShardIndex,
    features: Features,
    facts: dict[int, Product],
    split: str,
    threshold: float | Literal["auto"],
    overlays: list[Overlay],
) -> Iterator[tuple[str, Table | str]]:
    """The grounding tables; adds some images to `overlays`."""
    size = evaluator.config.model.image_size
    records = [
        image_record(index, facts[int(p)], int(p), int(row))
        for p, row in zip(features.products, features.rows, strict=True)
    ]
    keep = np.array([can_ground(record) for record in records])
    if not keep.any():
        yield "grounding", "no customer or ad image with a known size and box in this split"
        return
    chosen = features.select(keep)
    asked = [record for record in records if can_ground(record)]
    scenes = [make_scene(r, row=int(row), size=size) for r, row in zip(asked, chosen.rows, strict=True)]

    thresholds, mean_box, note = _prepare(evaluator, split, threshold)
    scores = score_scenes(chosen, scenes, size, thresholds, mean_box)
    everything = np.ones(len(scenes), dtype=bool)
    table = grounding_table(scores, everything, title="grounding by title", thresholds=thresholds)
    table.note = note
    yield "grounding", table
    unseen = np.array([bool(facts[int(p)].attributes.get("unseen_type")) for p in chosen.products])
    if unseen.any():
        title = "grounding by title, products whose head noun was not in training"
        yield "grounding_unseen_type", grounding_table(scores, unseen, title=title, thresholds=thresholds)

    # Evenly spread, so that nobody picks the pictures.
    for place in np.unique(np.linspace(0, len(scenes) - 1, min(NUM_OVERLAYS, len(scenes))).round().astype(int)):
        row = int(chosen.rows[place])
        pictures = {name: pixel_map(maps[place], size) for name, maps in chosen.score_maps().items()}
        overlays.append(
            Overlay(
                image=decode_square(index.read_image(row), size).permute(1, 2, 0).numpy(),
                title=index.title(row),
                truth=scenes[place].truth,
                maps=pictures,
                boxes={name: region_box(picture, thresholds[name]) for name, picture in pictures.items()},
            )
        )


def image_record(index: ShardIndex, product: Product, position: int, row: int) -> ImageRecord:
    """The record of an image by its row; `product` is the one at `position`. Images without a record come last."""
    place = row - int(index.image_start[position])
    return product.images[place] if place < len(product.images) else ImageRecord(file=index.image_key(row))


def _prepare(
    evaluator: Evaluator, split: str, threshold: float | Literal["auto"]
) -> tuple[dict[str, float], tuple[float, float], str]:
    """Thresholds by score map and the centre prior's box, both from the VAL split, and a note on where from."""
    names = ("instance", "global")
    size = evaluator.config.model.image_size
    fixed = DEFAULT_THRESHOLD if threshold == "auto" else threshold
    found = _val_scenes(evaluator)
    if isinstance(found, str):
        note = f"thresholds {fixed} as given, centre box half the side: {found}."
        return dict.fromkeys(names, fixed), (size / 2, size / 2), note
    index, rows, scenes = found
    sides = np.mean([scene.truth[2:] - scene.truth[:2] for scene in scenes], axis=0)
    mean_box = (float(sides[0]), float(sides[1]))
    if threshold != "auto":
        return dict.fromkeys(names, fixed), mean_box, f"thresholds {fixed} as given."
    features, _ = evaluator.features(index, rows, "val features")
    place = {int(row): i for i, row in enumerate(rows)}
    thresholds = choose_thresholds(features, [scenes[place[int(row)]] for row in features.rows], size)
    listed = ", ".join(f"{name} {value}" for name, value in thresholds.items())
    same = " (the split that is reported here)" if split == "val" else ""
    return thresholds, mean_box, f"thresholds chosen on {len(features)} val images{same}: {listed}."


def _val_scenes(evaluator: Evaluator) -> tuple[ShardIndex, NDArray[np.int64], list[Scene]] | str:
    """The val split's index, its images that can be grounded and their scenes, or why there are none."""
    try:
        index = evaluator.catalogue.open("val")
    except NoSplit as error:
        return f"no val split to choose from ({error})"
    rows: list[int] = []
    scenes: list[Scene] = []
    for position in range(index.num_products):
        for row, record in enumerate(index.product(position).images, start=int(index.image_start[position])):
            if can_ground(record):
                rows.append(row)
                scenes.append(make_scene(record, row=row, size=evaluator.config.model.image_size))
    return (index, np.array(rows, dtype=np.int64), scenes) if rows else "the val split has no boxes"
