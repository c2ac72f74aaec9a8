"""From a score map to the regions of an image: connected parts of the map above a threshold, the heaviest first.

The first region is the box that evaluation measures (`evaluate.boxes.region_box`).
Letters: N patches, g = sqrt(N) of them along a side, S side of the square in pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

from eclip.dataloading.schema import Box
from eclip.evaluate.boxes import pixel_map


@dataclass(frozen=True)
class Region:
    """A part of an image that a prompt took."""

    box: Box
    """x0, y0, x1, y1 in pixels of the upright image, half-open."""
    score: float
    """Its share of all that the map holds above the threshold, in (0, 1]; the shares of all regions sum to 1."""
    map: NDArray[np.float32]
    """(g, g) the whole score map, row by row from the top left, the same for all regions of a call: of the instance
    decoder the share of each patch that the prompt took from the other queries, in [0, 1]; without one the cosine of
    patch and prompt, in [-1, 1]."""


def find_regions(
    scores: NDArray[np.float32], size: tuple[float, float], *, side: int, threshold: float, limit: int
) -> list[Region]:
    """Regions of one map, at most `limit`, those with the largest sum of scores first.

    scores: (N,) finite; size: width and height of the image; side: S; threshold: cuts the map, brought to [0, 1], in
    [0, 1). A constant map says nothing: the whole image is its one region.
    """
    grid = math.isqrt(len(scores))
    picture = pixel_map(torch.from_numpy(np.asarray(scores, dtype=np.float32)), side)
    told = scores.reshape(grid, grid)
    labels, count = ndimage.label(picture > threshold)
    if not count:
        return [Region((0.0, 0.0, float(size[0]), float(size[1])), 1.0, told)]
    mass = ndimage.sum_labels(picture, labels, np.arange(1, count + 1))
    places = ndimage.find_objects(labels)
    scale = (size[0] / side, size[1] / side)
    found = []
    for part in np.argsort(-mass, kind="stable")[:limit]:
        rows, columns = places[int(part)]
        box = (columns.start * scale[0], rows.start * scale[1], columns.stop * scale[0], rows.stop * scale[1])
        found.append(Region(box, float(mass[part] / mass.sum()), told))
    return found
