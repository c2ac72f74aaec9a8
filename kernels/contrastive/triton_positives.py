"""Triton kernels for the positives alone, in fp32: their logits in the forward, their part of the gradients after.

A positive's entry of G is a small difference of numbers of order 1 late in training, and of order 1 itself early on: it
outweighs thousands of negatives. Rounded to bf16 with the rest it would decide the gradient's error, so the tiles of
the backward hold 0 there and these kernels add it exactly. A program owns a row (or a column) and goes through its
positives: the pair, and where these are "all" the columns of the same id, which `Matches` lists. Equations, letters and
arguments are those of ops.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2E, on_device_of
from .problem import CODE, END, ORDER, START, Logits


@triton.jit
def _logit(own, ptr, index, stride, d, dim, scale, bias_ptr, col, HAS_BIAS: tl.constexpr):
    """Row `index` of the other tower in fp32, and its logit with `own`; `col` is the text of the two."""
    other = tl.load(ptr + index.to(tl.int64) * stride + d, mask=d < dim, other=0.0).to(tl.float32)
    logit = tl.sum(own * other, 0) * scale
    if HAS_BIAS:
        logit += tl.load(bias_ptr + col).to(tl.float32)
    return other, logit


@triton.jit
def _contrastive_target_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    bias_ptr,
    row_code_ptr,
    col_code_ptr,
    start_ptr,
    end_ptr,
    order_ptr,
    row_weight_ptr,
    col_weight_ptr,
    target_ptr,
    image_stride,
    text_stride,
    num_cols,
    dim,
    offset,
    BY_ID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """target_i = sum of Y_ij s_ij over the positives of row i."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    own = tl.load(image_ptr + row.to(tl.int64) * image_stride + d, mask=d < dim, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    weight = tl.load(row_weight_ptr + row)
    target = 0.0
    pair = row + offset
    pair_counts = (pair >= 0) & (pair < num_cols)
    if BY_ID:
        row_code = tl.load(row_code_ptr + row)
        pair_counts = pair_counts & (tl.load(col_code_ptr + pair, mask=pair_counts, other=-2) != row_code)
        for place in range(tl.load(start_ptr + row), tl.load(end_ptr + row)):
            col = tl.load(order_ptr + place)
            _, logit = _logit(own, text_ptr, col, text_stride, d, dim, scale, bias_ptr, col, HAS_BIAS)
            target += (weight + tl.load(col_weight_ptr + col)) * logit
    if pair_counts:
        _, logit = _logit(own, text_ptr, pair, text_stride, d, dim, scale, bias_ptr, pair, HAS_BIAS)
        target += (weight + tl.load(col_weight_ptr + pair)) * logit
    tl.store(target_ptr + row, target)


@triton.jit
def _positive_gradient(
    logit, row, col, row_stat_ptr, col_stat_ptr, row_weight_ptr, col_weight_ptr, SIDES: tl.constexpr
):
    """G_ij of a positive."""
    if SIDES == "sigmoid":
        gradient = 1.0 / (1.0 + tl.exp2(-logit * LOG2E))
    else:
        gradient = tl.exp2((logit - tl.load(row_stat_ptr + row)) * LOG2E)
    if SIDES == "both":
        gradient += tl.exp2((logit - tl.load(col_stat_ptr + col)) * LOG2E)
    return gradient - (tl.load(row_weight_ptr + row) + tl.load(col_weight_ptr + col))


@triton.jit
def _contrastive_finish_kernel(
    own_ptr,  # the tower whose gradient this is
    other_ptr,
    products_ptr,  # (n, D), padded: sums of G times the other tower over all but the positives, or None
    sums_ptr,  # (n,) the same sums of G alone, or None
    scale_ptr,
    bias_ptr,
    factor_ptr,
    own_code_ptr,
    other_code_ptr,
    start_ptr,
    end_ptr,
    order_ptr,
    row_weight_ptr,
    col_weight_ptr,
    row_stat_ptr,
    col_stat_ptr,
    grad_ptr,  # (n, D)
    dot_ptr,  # (n,) <own, G other>, of one side
    bias_grad_ptr,  # (n,), for columns
    own_stride,
    other_stride,
    products_stride,
    num_other,
    dim,
    offset,
    SIDES: tl.constexpr,
    BY_ID: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the positives of one row (ROWS) or one column to its gradient, multiply by scale and factor, and round."""
    own_index = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    d_in = d < dim
    own = tl.load(own_ptr + own_index.to(tl.int64) * own_stride + d, mask=d_in, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    factor = tl.load(factor_ptr).to(tl.float32)
    if FEATURES:
        total = tl.load(products_ptr + own_index.to(tl.int64) * products_stride + d, mask=d_in, other=0.0)
    else:
        total = tl.zeros((BLOCK_D,), tl.float32)
    bias_grad = 0.0
    if BIAS_GRAD:
        bias_grad = tl.load(sums_ptr + own_index)
    pair = own_index + offset
    pair_counts = (pair >= 0) & (pair < num_other)
    if BY_ID:
        own_code = tl.load(own_code_ptr + own_index)
        pair_counts = pair_counts & (tl.load(other_code_ptr + pair, mask=pair_counts, other=-2) != own_code)
        for place in range(tl.load(start_ptr + own_index), tl.load(end_ptr + own_index)):
            index = tl.load(order_ptr + place)
            row, col = own_index, index
            if not ROWS:
                row, col = index, own_index
            other, logit = _logit(own, other_ptr, index, other_stride, d, dim, scale, bias_ptr, col, HAS_BIAS)
            gradient = _positive_gradient(
                logit, row, col, row_stat_ptr, col_stat_ptr, row_weight_ptr, col_weight_ptr, SIDES
            )
            total += gradient * other
            bias_grad += gradient
    if pair_counts:
        row, col = own_index, pair
        if not ROWS:
            row, col = pair, own_index
        other, logit = _logit(own, other_ptr, pair, other_stride, d, dim, scale, bias_ptr, col, HAS_BIAS)
        gradient = _positive_gradient(
            logit, row, col, row_stat_ptr, col_stat_ptr, row_weight_ptr, col_weight_ptr, SIDES
        )
        total += gradient * other
        bias_grad += gradient
    if FEATURES:
        grad_at = grad_ptr + own_index.to(tl.int64) * dim + d
        tl.store(grad_at, (total * (scale * factor)).to(grad_ptr.dtype.element_ty), mask=d_in)
    if DOTS:
        tl.store(dot_ptr + own_index, tl.sum(own * total, 0))
    if BIAS_GRAD:
        tl.store(bias_grad_ptr + own_index, bias_grad * factor)


def _row_options(dim: int) -> dict[str, int]:
    """A warp holds 512 numbers of a row, 16 a thread."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK_D": block, "num_warps": max(1, min(8, block // 512))}


def triton_target(logits: Logits) -> Tensor:
    """target (R,) of `pair_statistics`."""
    image, text = logits.image, logits.text
    target = torch.empty_like(logits.row_weight)
    with on_device_of(image):
        _contrastive_target_kernel[(image.shape[0],)](
            *(image, text, logits.scale, logits.bias),
            *_code_and_ranges(logits, rows=True),
            *(logits.row_weight, logits.col_weight, target),
            *(image.stride(0), text.stride(0), *text.shape, logits.offset),
            BY_ID=logits.positives == "all",
            HAS_BIAS=logits.bias is not None,
            **_row_options(image.shape[1]),
        )
    return target


def triton_finish(
    logits: Logits,
    row_stat: Tensor,
    col_stat: Tensor,
    factor: Tensor,
    dim: int,
    products: Tensor | None,
    sums: Tensor | None,
    *,
    rows: bool,
    dots: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the images (`rows`) or of the texts, with the positives added to the sums over all others.

    dim: D, beyond which features are padding. products: (n, >= D) fp32, G times the other tower, or None where features
    want no gradient. sums: (n,) fp32, of G, or None where the bias wants none. Returns the features' gradient (n, D)
    (empty without `products`), <own, G other> (n,) (empty without `products` and `dots`) and the bias's gradient (n,)
    (empty without `sums`).
    """
    own, other = (logits.image, logits.text) if rows else (logits.text, logits.image)
    count = own.shape[0]
    grad = own.new_empty((count if products is not None else 0, dim))
    dots = dots and products is not None
    dot = own.new_empty((count if dots else 0,), dtype=torch.float32)
    bias_grad = own.new_empty((count if sums is not None else 0,), dtype=torch.float32)
    if count == 0 or (products is None and sums is None):
        return grad, dot, bias_grad
    with on_device_of(own):
        _contrastive_finish_kernel[(count,)](
            *(own, other, products, sums, logits.scale, logits.bias, factor),
            *_code_and_ranges(logits, rows=rows),
            *(logits.row_weight, logits.col_weight, row_stat, col_stat, grad, dot, bias_grad),
            *(own.stride(0), other.stride(0), 0 if products is None else products.stride(0)),
            *(len(other), dim, logits.offset if rows else -logits.offset),
            SIDES=logits.sides,
            BY_ID=logits.positives == "all",
            ROWS=rows,
            FEATURES=products is not None,
            DOTS=dots,
            HAS_BIAS=logits.bias is not None,
            BIAS_GRAD=sums is not None,
            **_row_options(dim),
        )
    return grad, dot, bias_grad


def _code_and_ranges(logits: Logits, *, rows: bool) -> tuple[Tensor | None, ...]:
    """Codes of this side and of the other, first and last match of each, and the order that these count in.

    None unless equal ids are positives: else pairs alone are.
    """
    if logits.matches is None or logits.positives != "all":
        return (None,) * 5
    own, other = logits.matches if rows else reversed(logits.matches)
    return own[CODE], other[CODE], own[START], own[END], other[ORDER]
