"""The contrastive loss from cuBLAS products over square blocks of logits, with one elementwise pass over each block.

What remains of the fused kernels when fusing is left out: the same algorithm, 1u forward and 3u backward (u = 2 B^2 D
FLOP), memory linear in the batch, but every block of logits is written and read in float32. A fused kernel has to beat
this to be worth its code. torch.compile makes the elementwise passes on a GPU, so that each is a single kernel.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SIDE = 8192  # of a block: 256 MiB of float32 logits
SAFE = 64.0  # exp(logit - shift) stays within float32 for logits up to SAFE + shift, and so do sums of a million


def blocks(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both directions' mean for (B, D) features and a scale of one element; gradients for all three."""
    loss: Tensor = _Blocks.apply(image, text, scale)
    return loss


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        compute = torch.promote_types(image.dtype, torch.float32)
        shift = (scale - SAFE).clamp_min(0)
        sums = _fused(_sums) if image.is_cuda else _sums
        row_sum, col_sum = image.new_zeros((2, len(image)), dtype=compute).unbind()
        for rows, cols in _cut(len(image)):
            of_rows, of_cols = sums(_product(image[rows], text[cols].T), scale, shift)
            row_sum[rows] += of_rows
            col_sum[cols] += of_cols
        ctx.save_for_backward(image, text, scale, shift, row_sum, col_sum)
        positive = (image.to(compute) * text.to(compute)).sum(1) * scale - shift
        return (row_sum.log() + col_sum.log() - 2 * positive).mean() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale, shift, row_sum, col_sum = ctx.saved_tensors
        weights = _fused(_weights) if image.is_cuda else _weights
        # The positives' share, -2 of the weights, needs no block and keeps float32.
        grad_image, grad_text = (-2 * other.to(row_sum.dtype) for other in (text, image))
        for rows, cols in _cut(len(image)):
            logits = _product(image[rows], text[cols].T)
            weight = weights(logits, scale, shift, 1 / row_sum[rows], 1 / col_sum[cols], image.dtype)
            _add_product(grad_image[rows], weight, text[cols])
            _add_product(grad_text[cols], weight.T, image[rows])
        factor = grad * scale / (2 * len(image))
        grad_scale = (image * grad_image).sum() * grad / (2 * len(image))
        return (grad_image * factor).to(image.dtype), (grad_text * factor).to(text.dtype), grad_scale.to(scale.dtype)


def _cut(batch: int) -> Iterator[tuple[slice, slice]]:
    parts = [slice(start, start + SIDE) for start in range(0, batch, SIDE)]
    return ((rows, cols) for rows in parts for cols in parts)


def _sums(logits: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    mass = (logits * scale - shift).exp()
    return mass.sum(1), mass.sum(0)


def _weights(logits: Tensor, scale: Tensor, shift: Tensor, row: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    return ((logits * scale - shift).exp() * (row[:, None] + col)).to(dtype)


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least float32, from operands in their own dtype."""
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    compute = torch.promote_types(a.dtype, torch.float32)
    return a.to(compute) @ b.to(compute)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, where out is in at least float32."""
    if a.is_cuda and a.dtype.itemsize < 4:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += _product(a, b)
