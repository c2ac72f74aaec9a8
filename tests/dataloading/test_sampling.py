"""Order, pairs and crops: pure functions of their coordinates, with the distributions they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclip.dataloading.parts import Parts
from eclip.dataloading.sampling import NUM_CROP_DRAWS, Sampler, hash64, random_crop, uniforms
from eclip.dataloading.schedule import BatchSchedule
from eclip.dataloading.shards import ShardIndex
from tests.dataloading.fixtures import make_split


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return ShardIndex.open(make_split(tmp_path_factory.mktemp("data"), image=lambda p, i: b"x"), "train")


def sampler(index, batch=4, seed=0, rank=0, world_size=1):
    return Sampler(index, Parts(BatchSchedule.constant(batch), rank, world_size), seed=seed)


def test_hash_is_fixed_forever():
    assert hash64(0).tolist() == [16294208416658607535]  # SplitMix64's first output for seed 0
    assert hash64(1, -2, 3).tolist() == hash64(1, np.array([-2]), 3).tolist() != hash64(1, 3, -2).tolist()


def test_uniforms_are_uniform_and_independent_of_each_other():
    draws = uniforms(0, 2, 7, np.arange(20_000), 3)
    assert draws.min() >= 0 and draws.max() < 1
    # Standard errors: mean 0.002, correlation 0.007.
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01
    assert np.abs(draws.var(0) - 1 / 12).max() < 0.003
    other = uniforms(0, 2, 8, np.arange(20_000), 3)
    table = np.corrcoef(np.concatenate([draws, other, np.roll(draws, 1, axis=0)], 1).T)
    assert np.abs(table - np.eye(9)).max() < 0.04


def test_every_epoch_sees_every_product_once(index):
    s = sampler(index, batch=3)
    stream = np.concatenate([s.products(step) for step in range(7)])
    for epoch in range(3):
        assert sorted(stream[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert len({tuple(s.order(e)) for e in range(5)}) == 5
    assert [s.epoch(step) for step in (0, 2, 3, 7)] == [0, 0, 1, 3]


def test_steps_may_be_asked_in_any_order(index):
    forward, backward = sampler(index), sampler(index)
    steps = [forward.draw(s) for s in range(9)]
    for s in reversed(range(9)):
        for mine, theirs in zip(steps[s], backward.draw(s), strict=True):
            assert np.array_equal(mine, theirs)


def test_batch_larger_than_the_catalogue(index):
    rows, draws = sampler(index, batch=20).draw(3)
    assert rows.shape == (20, 2) and draws.shape == (20, 2, NUM_CROP_DRAWS)
    counts = np.bincount([index.product_of(int(r)) for r in rows[:, 0]], minlength=7)
    assert counts.min() >= 2 and counts.max() <= 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_hold_slices_of_the_global_batch(index, world_size):
    whole = sampler(index, batch=8).draw(5)
    parts = [sampler(index, batch=8, rank=r, world_size=world_size).draw(5) for r in range(world_size)]
    for i in (0, 1):
        assert np.array_equal(np.concatenate([part[i] for part in parts]), whole[i])


def test_seed_changes_order_pairs_and_crops(index):
    (rows, draws), (rows2, draws2) = sampler(index, 6).draw(0), sampler(index, 6, seed=1).draw(0)
    assert not np.array_equal(rows, rows2) and not np.isclose(draws, draws2).any()


def test_tars_stay_together_within_windows(index, monkeypatch):
    monkeypatch.setattr("eclip.dataloading.sampling.TAR_WINDOW", 1)
    orders = [index.product_shard[sampler(index, seed=seed).order(0)] for seed in range(6)]
    assert all((np.diff(tars) != 0).sum() == 1 for tars in orders)
    assert {tars[0] for tars in orders} == {0, 1}


def test_pairs_are_one_sku_from_two_sources(index):
    rows = np.concatenate([sampler(index, 70).draw(step)[0] for step in range(4)])
    assert np.array_equal(index.image_sku[rows[:, 0]], index.image_sku[rows[:, 1]])
    assert (index.image_source[rows[:, 0]] != index.image_source[rows[:, 1]]).all()
    assert len(np.unique(rows[:, 0])) == index.num_images


def test_products_with_little_choice_fall_back(tmp_path):
    for images in (1, 2, 4):
        small = ShardIndex.open(make_split(tmp_path / str(images), images=images, image=lambda p, i: b"x"), "train")
        rows = sampler(small, 28).draw(0)[0]
        assert all(small.product_of(a) == small.product_of(b) for a, b in rows.tolist())
        assert (rows[:, 0] != rows[:, 1]).all() == (images > 1)


def test_substitutes_prefer_the_other_source_and_end_with_the_next_product(index):
    s = sampler(index)
    # Rows 0-5 of product 0: sources 0 1 2 0 1 2, SKUs 0 0 0 1 1 1.
    assert s.substitutes(0, 1)[:5] == [2, 3, 5, 4, 1]
    assert set(s.substitutes(0, 1)[5:]) == set(range(6, 12))
    assert set(s.substitutes(41, 40)[5:]) == set(range(6))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
    st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1), st.floats(0.01, 1),
)  # fmt: skip
def test_crops_lie_inside(draws, width, height, a, b):
    x0, y0, x1, y1 = random_crop(np.array(draws), width, height, (min(a, b), max(a, b)))
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert all(isinstance(c, int) for c in (x0, y0, x1, y1))


def test_crops_have_the_promised_area_and_aspect():
    boxes = np.array([random_crop(u, 640, 480, (0.3, 0.9)) for u in uniforms(0, 2, 0, np.arange(2000), 5)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / (640 * 480), w / h
    assert 0.295 < area.min() < 0.31 and 0.89 < area.max() < 0.905 and abs(area.mean() - 0.6) < 0.02
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert random_crop(np.zeros(5), 64, 64, (1.0, 1.0)) == (0, 0, 64, 64)
