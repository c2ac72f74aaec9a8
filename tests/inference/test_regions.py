"""A map's regions: in the image's pixels, the heaviest first, the first one what evaluation measures."""

import numpy as np
import pytest
import torch

from eclip.evaluate.boxes import pixel_map, region_box
from eclip.inference.regions import find_regions

GRID, SIDE = 7, 70


def scores(*patches: tuple[int, int, float]) -> np.ndarray:
    found = np.zeros((GRID, GRID), np.float32)
    for row, column, value in patches:
        found[row, column] = value
    return found.reshape(-1)


def test_two_regions_in_the_images_own_pixels() -> None:
    told = scores((1, 1, 0.9), (1, 2, 0.9), (5, 5, 0.8))
    first, second = find_regions(told, (140, 35), side=SIDE, threshold=0.5, limit=5)
    assert first.score > second.score and first.score + second.score == pytest.approx(1)
    x0, y0, x1, y1 = first.box
    assert 0 <= x0 < 30 and 55 < x1 < 70 and 2 < y0 < 7 and 8 < y1 < 12  # columns 1 to 2, row 1, of 20 x 5 px
    assert np.array_equal(first.map.reshape(-1), told) and first.map.shape == (GRID, GRID)
    assert len(find_regions(told, (140, 35), side=SIDE, threshold=0.5, limit=1)) == 1


def test_the_first_region_is_the_one_that_evaluation_measures() -> None:
    rng = np.random.default_rng(1)
    for threshold in (0.0, 0.3, 0.8):
        told = rng.random(GRID * GRID).astype(np.float32)
        box = region_box(pixel_map(torch.from_numpy(told), SIDE), threshold)
        assert find_regions(told, (SIDE, SIDE), side=SIDE, threshold=threshold, limit=3)[0].box == tuple(box)


def test_a_constant_map_says_nothing() -> None:
    (whole,) = find_regions(np.full(GRID * GRID, 0.3, np.float32), (20, 10), side=SIDE, threshold=0.5, limit=5)
    assert whole.box == (0, 0, 20, 10) and whole.score == 1
