"""Triton: blocks of G from the exp(s - shift) that the forward kept, without a product.

Equations, letters and arguments are those of contrastive_ops.py; the block is as contrastive_backward_kernels.py makes
it from the features.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device_of
from .triton_tiles import no_positives, row_factor, store_tile

_RESCALE = {"BLOCK_R": 64, "BLOCK_C": 128, "num_warps": 4}
PLACE = ("first_row", "first_col", "last_row", "last_col", "num_rows", "num_cols", "offset")
"""Arguments that say which part of the matrix a block is."""


@triton.jit
def _contrastive_rescale_kernel(
    kept_ptr,  # (R, C) exp(s - shift)
    row_code_ptr,
    col_code_ptr,
    row_stat_ptr,
    col_stat_ptr,
    shift_ptr,
    unsafe_ptr,
    block_ptr,
    sums_ptr,
    kept_stride,
    block_stride,
    first_row,
    first_col,
    last_row,
    last_col,
    num_rows,
    num_cols,
    offset,
    KIND: tl.constexpr,
    MATCH: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The same tile from what the forward kept, unless that is of no use (`unsafe`)."""
    if tl.load(unsafe_ptr) != 0:
        return
    row = first_row + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = first_col + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < last_row)[:, None] & (col < last_col)[None, :]
    kept_at = kept_ptr + row.to(tl.int64)[:, None] * kept_stride + col[None, :]
    gradient = tl.load(kept_at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr).to(tl.float32)
    weight = row_factor(row_stat_ptr, row, num_rows, shift)[:, None]
    if KIND == "both":
        weight = weight + row_factor(col_stat_ptr, col, num_cols, shift)[None, :]
    gradient = no_positives(gradient * weight, row_code_ptr, col_code_ptr, row, col, num_rows, num_cols, offset, MATCH)
    block_row, block_col = tl.program_id(0) * BLOCK_R, tl.program_id(1) * BLOCK_C
    store_tile(block_ptr, block_stride, block_row, block_col, gradient)
    if SUMS:
        at = sums_ptr + tl.program_id(0).to(tl.int64) * (last_col - first_col) + (col - first_col)
        tl.store(at, tl.sum(gradient, 0), mask=col < last_col)


def rescale_kept(kept: Tensor, tensors: tuple[Tensor | None, ...], place: tuple[int, ...], **choices: Any) -> None:
    """Fill a block of G. tensors: from the codes to the block and its sums; place: `PLACE`; choices: of the kernel."""
    first_row, first_col, last_row, last_col, *_ = place
    block = tensors[-2]
    assert block is not None
    grid = (
        triton.cdiv(last_row - first_row, _RESCALE["BLOCK_R"]),
        triton.cdiv(last_col - first_col, _RESCALE["BLOCK_C"]),
    )
    with on_device_of(kept):
        _contrastive_rescale_kernel[grid](
            *(kept, *tensors, kept.stride(0), block.stride(0), *place), **choices, **_RESCALE
        )
