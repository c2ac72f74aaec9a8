"""Visual grounding: where in a cluttered image is the product that the title names?

Query: the image's own title. Images: customer photos and ad frames. Truth: the box of the image's first instance.
Four questions to each score map (see `Features.score_maps`), none of which uses the truth:
  region   box of the thresholded connected region; Acc@0.5, Acc@0.7 by IoU
  ranked   best of given proposals, as in the paper: all instances' boxes and NUM_DISTRACTORS random boxes
  which    best of the instances' boxes alone: the right one of the products in the image
  point    is the map's peak inside the true box
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.schema import ImageRecord, Instance
from eclip.dataloading.shards import ShardIndex
from eclip.evaluate.boxes import Array, box_iou, contains, peak, pixel_map, random_boxes, region_box, score_boxes
from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.features import Features
from eclip.evaluate.inputs import NoSplit
from eclip.evaluate.report.sheet import Overlay
from eclip.evaluate.report.tables import Table

SOURCES = ("customer", "ad")
THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))
DEFAULT_THRESHOLD = 0.5
NUM_OVERLAYS = 12

Scores = dict[str, dict[str, Array]]
"""Row of the table -> metric -> (n,) value of each image."""


def run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]:
    """The table of all images, that of products of unseen type where there are some, and overlays of a few images."""
    size = evaluator.config.model.image_size
    records = split.records()
    keep = np.array([can_ground(record) for record in records])
    if not keep.any():
        yield "grounding", "no customer or ad image with a known size and box in this split"
        return
    features = split.features.select(keep)
    asked = [record for record in records if can_ground(record)]
    scenes = [make_scene(r, row=int(row), size=size) for r, row in zip(asked, features.rows, strict=True)]

    thresholds, mean_box, note = _calibrate(evaluator, split.name)
    scores = score_scenes(features, scenes, size, thresholds, mean_box)
    everything = np.ones(len(scenes), dtype=bool)
    table = grounding_table(scores, everything, title="grounding by title", thresholds=thresholds)
    table.note = note
    yield "grounding", table
    unseen = split.unseen_type()[keep]
    if unseen.any():
        title = "grounding by title, products whose head noun was not in training"
        yield "grounding_unseen_type", grounding_table(scores, unseen, title=title, thresholds=thresholds)
    yield "grounding", _draw_some(split.index, features, scenes, size, thresholds)


@dataclass(kw_only=True)
class Scene:
    """What is known of one image, in pixels of the S x S square."""

    seed: int
    """The image's row: seeds its proposals."""
    boxes: Array
    """(instances, 4); the first is the truth."""

    @property
    def truth(self) -> Array:
        return self.boxes[0]

    def proposals(self, size: int) -> tuple[Array, Array]:
        """All proposals (P, 4) and the instances alone, each in a shuffled order: ties must not favour the truth."""
        rng = np.random.default_rng([20231, self.seed])
        everything = np.concatenate([self.boxes, random_boxes(self.seed, size)])
        return everything[rng.permutation(len(everything))], self.boxes[rng.permutation(len(self.boxes))]


def can_ground(record: ImageRecord) -> bool:
    """Whether an image takes part: its source is asked about, and its size and the product's box are known."""
    known = record.source in SOURCES and bool(record.instances) and record.width > 0 and record.height > 0
    return known and _has_area(record.instances[0])


def _has_area(instance: Instance) -> bool:
    x0, y0, x1, y1 = instance.box
    return all(map(math.isfinite, instance.box)) and x0 < x1 and y0 < y1


def make_scene(record: ImageRecord, *, row: int, size: int) -> Scene:
    """Scale a record's boxes to the square of `size` pixels that the image is squashed to."""
    scale = np.array([size / record.width, size / record.height] * 2)
    boxes = [instance.box for instance in record.instances if _has_area(instance)]
    return Scene(seed=row, boxes=np.array(boxes, dtype=np.float64) * scale)


def choose_thresholds(features: Features, scenes: Sequence[Scene], size: int) -> dict[str, float]:
    """The threshold of each score map with the best region Acc@0.5 (then mean IoU) on these images: a VAL split."""
    truth = np.stack([scene.truth for scene in scenes])
    chosen = {}
    for name, maps in features.score_maps().items():
        pictures = [pixel_map(m, size) for m in maps]
        ious = {t: box_iou(np.stack([region_box(p, t) for p in pictures]), truth) for t in THRESHOLDS}
        chosen[name] = max(THRESHOLDS, key=lambda t: (float((ious[t] >= 0.5).mean()), float(ious[t].mean())))
    return chosen


def score_scenes(
    features: Features,
    scenes: Sequence[Scene],
    size: int,
    thresholds: Mapping[str, float],
    mean_box: tuple[float, float],
) -> Scores:
    """Answer all questions for every image; features' images and `scenes` correspond.

    mean_box: width and height in pixels of the "centre prior" row's box. That row answers without looking: its map is
    a bump in the image's middle. Row "random" is the exact expectation of a uniformly drawn proposal, instance or pixel
    (region: a random box).
    """
    prior = centre_prior(size, mean_box)
    collected: dict[str, list[dict[str, float]]] = {}
    for place, scene in enumerate(scenes):
        everything, instances = scene.proposals(size)
        for name, maps in features.score_maps().items():
            picture = pixel_map(maps[place], size)
            box = region_box(picture, thresholds[name])
            collected.setdefault(name, []).append(_answer(picture, box, scene, everything, instances))
        middle = np.array([size - mean_box[0], size - mean_box[1], size + mean_box[0], size + mean_box[1]]) / 2
        collected.setdefault("centre prior", []).append(_answer(prior, middle, scene, everything, instances))
        random, given = (box_iou(boxes, scene.truth) for boxes in (random_boxes(scene.seed, size), everything))
        collected.setdefault("random", []).append(
            _accuracies("region", random)
            | _accuracies("ranked", given)
            | {"which": 1 / len(instances), "point": float(np.prod(scene.truth[2:] - scene.truth[:2])) / size**2}
        )
    return {row: {m: np.array([s[m] for s in found]) for m in found[0]} for row, found in collected.items()}


def grounding_table(scores: Scores, keep: NDArray[np.bool_], *, title: str, thresholds: Mapping[str, float]) -> Table:
    """Mean over the images of `keep` (n,)."""
    rows = {row: {m: float(values[keep].mean()) for m, values in metrics.items()} for row, metrics in scores.items()}
    return Table(title=title, rows=rows, counts={"images": int(keep.sum())}, settings={"thresholds": dict(thresholds)})


def _calibrate(evaluator: Evaluator, split: str) -> tuple[dict[str, float], tuple[float, float], str]:
    """Thresholds by score map and the centre prior's box, both from the VAL split, and a note on where from."""
    names = ("instance", "global")
    size, threshold = evaluator.config.model.image_size, evaluator.threshold
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


def _draw_some(
    index: ShardIndex, features: Features, scenes: Sequence[Scene], size: int, thresholds: Mapping[str, float]
) -> list[Overlay]:
    """At most NUM_OVERLAYS images, evenly spread, so that nobody picks the pictures."""
    overlays = []
    for place in np.unique(np.linspace(0, len(scenes) - 1, min(NUM_OVERLAYS, len(scenes))).round().astype(int)):
        row = int(features.rows[place])
        pictures = {name: pixel_map(maps[place], size) for name, maps in features.score_maps().items()}
        overlays.append(
            Overlay(
                image=decode_square(index.read_image(row), size).permute(1, 2, 0).numpy(),
                title=index.title(row),
                truth=scenes[place].truth,
                maps=pictures,
                boxes={name: region_box(picture, thresholds[name]) for name, picture in pictures.items()},
            )
        )
    return overlays


def centre_prior(size: int, mean_box: tuple[float, float]) -> Array:
    """A Gaussian bump in the middle, half the box's sides as standard deviations. (S, S) in (0, 1]."""
    place = np.arange(size) + 0.5 - size / 2
    x, y = (np.exp(-0.5 * (place / (side / 2)) ** 2) for side in mean_box)
    return y[:, None] * x[None]


def _answer(picture: Array, box: Array, scene: Scene, everything: Array, instances: Array) -> dict[str, float]:
    best = everything[np.argmax(score_boxes(picture, everything))]
    pick = instances[np.argmax(score_boxes(picture, instances))]
    return (
        _accuracies("region", box_iou(box, scene.truth))
        | _accuracies("ranked", box_iou(best, scene.truth))
        | {"which": float(np.array_equal(pick, scene.truth)), "point": float(contains(scene.truth, *peak(picture)))}
    )


def _accuracies(name: str, iou: Array) -> dict[str, float]:
    return {f"{name} Acc@{t}": float(np.mean(iou >= t)) for t in (0.5, 0.7)}
