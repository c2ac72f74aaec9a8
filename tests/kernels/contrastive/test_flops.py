"""FLOPs as torch's counter sees them: by hand, and as of the reference, in one process and over ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eclip.kernels.contrastive import (
    contrastive_loss,
    contrastive_loss_reference,
    ops,
    sigmoid_loss,
    sigmoid_loss_reference,
)
from eclip.kernels.contrastive.problem import Logits
from tests.helpers import run_torchrun

R, C, D = 9, 12, 16
PRODUCT = 2 * R * C * D


def count(loss: Callable[..., Tensor], *inputs: Any, **options: Any) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        total = loss(*inputs, **options)
    with FlopCounterMode(display=False) as backward:
        total.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("frozen", ["", "image", "text"])
def test_both_sides_as_the_reference(path: torch.device, frozen: str) -> None:
    found = []
    for loss in (contrastive_loss, contrastive_loss_reference):
        image, text = (torch.randn(R, D, device=path, requires_grad=name != frozen) for name in ("image", "text"))
        scale = torch.tensor(5.0, device=path, requires_grad=True)
        found.append(count(loss, image, text, scale))
    product = 2 * R * R * D
    assert found[0] == found[1] == (product, (1 if frozen else 2) * product)


def test_rows_against_keys_as_the_reference(path: torch.device) -> None:
    found = []
    for loss in (contrastive_loss, contrastive_loss_reference):
        image, keys = torch.randn(R, D, device=path, requires_grad=True), torch.randn(C, D, device=path)
        found.append(count(loss, image, keys, 5.0, sides="rows"))
    assert found[0] == found[1] == (PRODUCT, PRODUCT)


def test_sigmoid_as_the_reference(path: torch.device) -> None:
    found = []
    for loss in (sigmoid_loss, sigmoid_loss_reference):
        image, text = (torch.randn(R, D, device=path, requires_grad=True) for _ in range(2))
        found.append(count(loss, image, text, 5.0, -3.0))
    product = 2 * R * R * D
    assert found[0] == found[1] == (product, 2 * product)


def test_the_scale_alone_needs_no_product_that_counts() -> None:
    """The products that stand for logits computed again are no model FLOPs."""
    scale = torch.tensor(5.0, requires_grad=True)
    assert count(contrastive_loss, torch.randn(R, D), torch.randn(R, D), scale) == (2 * R * R * D, 0)


def test_statistics_of_a_block_are_an_op(path: torch.device) -> None:
    """What ranks.py calls for each block of columns; `kept` is written in place."""
    image, text = torch.randn(R, D, device=path), torch.randn(C, D, device=path)
    ones = [torch.ones(n, device=path) for n in (R, C)]
    scale, shift = torch.tensor(2.0, device=path), torch.zeros(1, device=path)
    logits = Logits(image, text, scale, None, None, None, *ones, shift, 0, "both", "diagonal")
    with FlopCounterMode(display=False) as counter:
        ops.pair_statistics(logits, None)
    assert counter.get_total_flops() == PRODUCT
    torch.library.opcheck(ops._pair_statistics, (*logits, None))


SHARE = """
import torch, torch.distributed as dist
from tests.kernels.contrastive.test_flops import count_share

dist.init_process_group("gloo")
count_share(dist.group.WORLD)
dist.destroy_process_group()
"""


def count_share(group: dist.ProcessGroup) -> None:
    """A rank's rows against all columns: a product forward, two backward."""
    rows = (5, 3)
    own, every = rows[dist.get_rank(group)], sum(rows)
    image, text = (torch.randn(own, D, requires_grad=True) for _ in range(2))
    product = 2 * own * every * D
    assert count(contrastive_loss, image, text, 5.0, group=group) == (product, 2 * product)


def test_a_rank_counts_its_share() -> None:
    run_torchrun(SHARE)
