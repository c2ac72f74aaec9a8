"""Plain PyTorch and blocks of logits against the reference."""

import functools

import pytest
import torch

from benchmarks.contrastive import blocks
from benchmarks.contrastive.baselines import eager_fixed_keys, eager_soft
from eclip.kernels.contrastive import contrastive_loss_reference
from tests.benchmarks.contrastive.problem import IDS, assert_same, problem, value_and_gradients


def test_blocks_that_do_not_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIDE", 10)
    for scale in (5.0, 117.0):  # with and without a shift
        inputs = problem(scale)
        expected = value_and_gradients(contrastive_loss_reference, *inputs)
        torch.testing.assert_close(value_and_gradients(blocks.blocks, *inputs), expected)


def test_eager_with_ids() -> None:
    assert_same(functools.partial(eager_soft, ids=IDS), None, image_ids=IDS, positives="soft")
    fixed = {"image_ids": IDS, "positives": "mask", "sides": "rows"}
    assert_same(functools.partial(eager_fixed_keys, ids=IDS), None, **fixed)
