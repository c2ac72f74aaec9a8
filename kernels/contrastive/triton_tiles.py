"""A tile of logits in registers: what the forward and the backward kernels of the contrastive losses begin with.

Letters, shapes and `shift` are those of contrastive_ops.py. Logits are in units of log 2 there, as exp2 wants them:
exp(s - shift) = exp2(x), x = acc * (scale * log2 e) + (bias - shift) * log2 e, one multiply-add an element.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import LOG2E


@triton.jit
def products(
    image_ptr,
    text_ptr,
    first_row,
    first_col,
    num_rows,
    num_cols,
    image_stride,
    text_stride,
    dim,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """fp32 inner products of BLOCK_R images and BLOCK_C texts from the given ones on, garbage beyond the last of them.

    Returned are the left and the right half of the tile, (BLOCK_R, BLOCK_C / 2) each: what follows goes through them
    one after the other and needs registers for half a tile beside the sums.
    """
    # Indices beyond the end read the last row: no masks, which would cost a predicate for every load.
    row = tl.minimum(tl.arange(0, BLOCK_R), num_rows - 1 - first_row)
    left_col = tl.minimum(tl.arange(0, BLOCK_C // 2), num_cols - 1 - first_col)
    right_col = tl.minimum(BLOCK_C // 2 + tl.arange(0, BLOCK_C // 2), num_cols - 1 - first_col)
    d = tl.arange(0, BLOCK_D)
    image_at = image_ptr + tl.cast(first_row, tl.int64) * image_stride + row[:, None] * image_stride + d[None, :]
    text_at = text_ptr + tl.cast(first_col, tl.int64) * text_stride + d[:, None]
    left_at, right_at = text_at + left_col[None, :] * text_stride, text_at + right_col[None, :] * text_stride
    left = tl.zeros((BLOCK_R, BLOCK_C // 2), tl.float32)
    right = tl.zeros((BLOCK_R, BLOCK_C // 2), tl.float32)
    for start in range(0, dim, BLOCK_D):
        image = tl.load(image_at + start)
        left_text = tl.load(left_at + start)
        right_text = tl.load(right_at + start)
        left = tl.dot(image, left_text, left, input_precision=PRECISION)
        right = tl.dot(image, right_text, right, input_precision=PRECISION)
    return left, right


@triton.jit
def column_offsets(bias_ptr, col, num_cols, shift, HAS_BIAS: tl.constexpr):
    """(bias - shift) in units of log 2; -inf beyond the last column, so that exp2 is 0 there."""
    offset = tl.zeros_like(col).to(tl.float32) - shift
    if HAS_BIAS:
        offset += tl.load(bias_ptr + col, mask=col < num_cols, other=0.0).to(tl.float32)
    return tl.where(col < num_cols, offset * LOG2E, float("-inf"))


@triton.jit
def same_ids(row_code_ptr, col_code_ptr, row, col, num_rows, num_cols):
    """(BLOCK_R, BLOCK_C) whether row and column carry one id; False beyond the end."""
    row_code = tl.load(row_code_ptr + row, mask=row < num_rows, other=-1)
    col_code = tl.load(col_code_ptr + col, mask=col < num_cols, other=-2)
    return row_code[:, None] == col_code[None, :]


@triton.jit
def row_factor(stat_ptr, index, count, shift):
    """exp(shift - stat): what exp(s - shift) is multiplied with to be a probability; 0 beyond the end."""
    stat = tl.load(stat_ptr + index, mask=index < count, other=float("inf"))
    return tl.exp2((shift - stat) * LOG2E)


@triton.jit
def no_positives(
    gradient,
    row_code_ptr,
    col_code_ptr,
    row,
    col,
    num_rows,
    num_cols,
    offset,
    MATCH: tl.constexpr,
):
    """`gradient` with 0 at the pairs and, with MATCH, wherever ids are equal: positives, or pairs that do not count."""
    gradient = tl.where((row + offset)[:, None] == col[None, :], 0.0, gradient)
    if MATCH:
        same = same_ids(row_code_ptr, col_code_ptr, row, col, num_rows, num_cols)
        gradient = tl.where(same, 0.0, gradient)
    return gradient


@triton.jit
def store_tile(ptr, stride, first_row, first_col, values):
    """Write a tile into a matrix whose memory has its `padded_shape`, in the matrix's dtype."""
    row, col = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    at = ptr + tl.cast(first_row, tl.int64) * stride + first_col + row[:, None] * stride + col[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty))


def whole_tiles(features: Tensor) -> Tensor:
    """Features (n, D) as `products` reads them: D a multiple of 64, padded with 0, rows at multiples of 32 bytes.

    A copy unless they are so already. Else loads would need masks, and could not be 16 bytes wide.
    """
    missing = -features.shape[1] % 64
    if missing:
        return F.pad(features, (0, missing))
    aligned = features.stride(1) == 1 and features.stride(0) % 16 == 0 and features.data_ptr() % 16 == 0
    # Offsets within a tile of up to 256 rows are 32 bits wide.
    return features if aligned and features.stride(0) < 2**23 else features.clone(memory_format=torch.contiguous_format)


def seldom_run(x: Tensor, pieces: int) -> tuple[int]:
    """Grid of a kernel whose programs mostly return at once, and else share `pieces` of work among them.

    A program a piece would be 65,536 for nothing in a block of G. Of the largest such kernel 2 fit a multiprocessor.
    """
    return (min(pieces, 4 * launch.multiprocessors(x)),)


def padded_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of memory for `store_tile`: whole tiles, so that no store needs a mask (which would cost registers)."""
    return triton.cdiv(rows, 128) * 128, triton.cdiv(cols, 256) * 256


# Else ptxas aims at 96 or 128 registers here and there, and spills.
_ALL_REGISTERS = {"maxnreg": 255}


def tile_options(dtype: torch.dtype, generation: int, *, small: bool = False, narrow: bool = False) -> dict[str, Any]:
    """Blocks, warps and stages of a kernel that is little but a matrix product; none of the compile cases spills.

    128 x 256 on Hopper: by arithmetic a 128 x 128 tile reads 64 bytes from L2 for every clock of its tensor cores and
    this one 48. An L2 that gives some 40 to each multiprocessor (not measured here) bounds both, this one less. narrow:
    for what would spill with it. small: for kernels that seldom run.
    """
    if dtype == torch.float32:  # at full precision the tensor cores are out: TF32 would miss s by 0.05 at scale 100
        full = {"PRECISION": "ieee", "BLOCK_R": 32, "BLOCK_C": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
        return full | _ALL_REGISTERS
    half = {"PRECISION": "tf32", "BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4}
    if small:
        return half | {"BLOCK_R": 64, "num_warps": 4, "num_stages": 3} | _ALL_REGISTERS
    if generation < 9:
        return half | {"BLOCK_D": 32}
    if generation > 9 or narrow:
        return half | _ALL_REGISTERS
    return half | {"BLOCK_C": 256}
