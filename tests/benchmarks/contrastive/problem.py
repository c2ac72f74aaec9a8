"""A small float64 problem, and how two losses are compared on it."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.kernels.contrastive import contrastive_loss_reference

B, D = 24, 16
IDS = torch.arange(B) * 2 // 3


def problem(scale: float = 20.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return image, text, torch.tensor(scale, dtype=torch.float64)


def value_and_gradients(loss: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


def assert_same(loss: Any, expected: Any, **options: Any) -> None:
    inputs = problem()
    reference = functools.partial(contrastive_loss_reference, **options) if expected is None else expected
    torch.testing.assert_close(value_and_gradients(loss, *inputs), value_and_gradients(reference, *inputs))
