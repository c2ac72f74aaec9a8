"""Score maps to boxes: regions, proposals and their ranking; overlap."""

import math

import numpy as np
import pytest
import torch

from eclip.evaluate.boxes import box_iou, contains, peak, pixel_map, random_boxes, region_box, score_boxes


def painted(*boxes: tuple[int, int, int, int, float]) -> np.ndarray:
    picture = np.zeros((32, 32))
    for x0, y0, x1, y1, value in boxes:
        picture[y0:y1, x0:x1] = value
    return picture


def test_region_is_the_component_with_most_mass() -> None:
    picture = painted((2, 3, 12, 9, 0.8), (20, 20, 23, 23, 1.0))
    np.testing.assert_array_equal(region_box(picture, 0.5), [2, 3, 12, 9])
    np.testing.assert_array_equal(region_box(picture, 0.9), [20, 20, 23, 23])
    np.testing.assert_array_equal(region_box(np.zeros((32, 32)), 0.5), [0, 0, 32, 32])


def test_pixel_map_is_normalised_and_keeps_places() -> None:
    patches = torch.zeros(4, 4)
    patches[1, 2] = -3.0
    patches[3, 0] = 7.0
    picture = pixel_map(patches.flatten(), 32)
    assert picture.shape == (32, 32) and picture.min() == 0 and picture.max() == 1
    x, y = peak(picture)
    assert contains(np.array([0.0, 24, 8, 32]), x, y)
    assert not pixel_map(torch.full((16,), 0.3), 32).any()
    assert peak(np.zeros((32, 32))) == (16.0, 16.0)


def test_score_is_the_correlation_with_the_boxs_mask() -> None:
    rng = np.random.default_rng(0)
    picture = rng.random((32, 32))
    boxes = np.array([[0.0, 0, 32, 32], [3, 4, 20, 9], [10, 0, 11, 1], [31.7, 31.7, 31.9, 31.9]])
    scores = score_boxes(picture, boxes)
    assert scores[0] == 0
    for box, score in zip(boxes[1:3].astype(int), scores[1:3], strict=True):
        mask = painted((*box, 1.0))
        np.testing.assert_allclose(score, np.corrcoef(mask.ravel(), picture.ravel())[0, 1], atol=1e-12)
    assert np.isfinite(scores).all()


def test_the_right_size_wins() -> None:
    """Neither a small box inside the object nor one around it beats the object's own."""
    picture = painted((8, 8, 24, 20, 1.0))
    boxes = np.array([[12.0, 12, 16, 16], [8, 8, 24, 20], [4, 4, 28, 26], [0, 0, 32, 32]])
    assert score_boxes(picture, boxes).argmax() == 1


def test_random_boxes_are_inside_and_repeatable() -> None:
    boxes = random_boxes(7, 96)
    np.testing.assert_array_equal(boxes, random_boxes(7, 96))
    assert (boxes != random_boxes(8, 96)).all()
    assert (boxes >= 0).all() and (boxes <= 96).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert 0 < box_iou(boxes, np.array([24.0, 24, 72, 72])).mean() < 0.5


def test_box_iou_by_hand() -> None:
    truth = np.array([0.0, 0, 10, 10])
    boxes = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4]])
    np.testing.assert_allclose(box_iou(boxes, truth), [1, 1 / 3, 0, 0.04])


def test_box_iou_of_a_box_that_is_not_finite_is_refused() -> None:
    good, bad = np.array([0.0, 0, 10, 10]), np.array([[0.0, 0, math.nan, 10]])
    for a, b in ((good, bad), (bad, good), (good, np.full(4, np.inf))):
        with pytest.raises(ValueError, match="a box is not finite"):
            box_iou(a, b)
    assert box_iou(np.zeros(4), np.zeros(4)) == 0
