"""Boxes: from a score map to one (a thresholded region, or the best of given proposals), and their overlap.

Letters: S side of the square image in pixels, g patches along a side, N = g*g, P proposals. Boxes are x0, y0, x1, y1
in pixels of the S x S image, half-open; the images were squashed to that square, and IoU does not change under it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

NUM_DISTRACTORS = 20

Array = NDArray[np.float64]


def pixel_map(scores: torch.Tensor, size: int) -> Array:
    """Patch scores as a picture: bilinear upsampling, then min-max normalised to [0, 1].

    scores: (N,), rows of patches first. Returns (S, S) float64; a constant map becomes zeros.
    """
    grid = math.isqrt(scores.numel())
    # Normalised before upsampling too: the rounding noise of an upsampled constant must not become a picture.
    patches = _normalised(scores.double()).view(1, 1, grid, grid)
    return _normalised(F.interpolate(patches, size=(size, size), mode="bilinear")[0, 0]).numpy()


def _normalised(scores: torch.Tensor) -> torch.Tensor:
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.zeros_like(scores)


def region_box(picture: Array, threshold: float) -> Array:
    """Bounding box of the connected region (4-neighbours) with the largest sum of scores above `threshold`.

    picture: (S, S) in [0, 1]. Returns (4,); the whole image when nothing is above.
    """
    labels, count = ndimage.label(picture > threshold)
    if not count:
        return np.array([0, 0, picture.shape[1], picture.shape[0]], dtype=np.float64)
    mass = ndimage.sum_labels(picture, labels, np.arange(1, count + 1))
    rows, columns = ndimage.find_objects(labels)[int(np.argmax(mass))]
    return np.array([columns.start, rows.start, columns.stop, rows.stop], dtype=np.float64)


def peak(picture: Array) -> tuple[float, float]:
    """x, y of the highest score: the middle of all pixels that reach it (a constant map points at the centre)."""
    rows, columns = np.nonzero(picture >= picture.max())
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def contains(box: Array, x: float, y: float) -> bool:
    return bool(box[0] <= x < box[2] and box[1] <= y < box[3])


def random_boxes(seed: int, size: int, count: int = NUM_DISTRACTORS) -> Array:
    """Distractor proposals: sides drawn log-uniformly from 0.1 S to 0.9 S each, any place inside; (count, 4).

    A pure function of its arguments; the caller seeds with the image's row.
    """
    rng = np.random.default_rng([20230, seed])
    sides = size * np.exp(rng.uniform(np.log(0.1), np.log(0.9), (count, 2)))
    start = rng.uniform(0, 1, (count, 2)) * (size - sides)
    return np.concatenate([start, start + sides], axis=1)


def score_boxes(picture: Array, boxes: Array) -> Array:
    """Pearson correlation of the map with each box's mask: (mean inside - mean outside) * sqrt(a (1-a)) / std.

    a is the box's share of the image. The plain difference of means prefers the smallest box around the peak and the
    plain mean of the inside even more so; the square root is what makes boxes of different sizes comparable.
    picture: (S, S); boxes: (P, 4), rounded to pixels, at least one pixel. Returns (P,), 0 where the box is everything.
    """
    size = picture.shape[0]
    start = np.clip(np.floor(boxes[:, :2] + 0.5).astype(int), 0, size - 1)
    stop = np.clip(np.floor(boxes[:, 2:] + 0.5).astype(int), start + 1, size)
    integral = np.pad(picture.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    (x0, y0), (x1, y1) = start.T, stop.T
    inside = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    share = (x1 - x0) * (y1 - y0) / picture.size
    covariance = inside / picture.size - share * picture.mean()
    spread = np.sqrt(share * (1 - share)) * picture.std()
    return np.where(spread > 0, covariance / np.where(spread > 0, spread, 1), 0.0)


def box_iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes x0, y0, x1, y1 (half-open). a, b: (..., 4), broadcast. Returns (...).

    Raises ValueError for NaN and infinity.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a box is not finite: its overlap is undefined")
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - common
    return common / np.maximum(union, 1e-12)
