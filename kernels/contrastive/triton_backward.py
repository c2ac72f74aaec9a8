"""Triton backward of the contrastive losses: blocks of G in bounded memory, multiplied out by the library's GEMM.

    G_ij = exp(s_ij - shift) (exp(shift - r_i) + exp(shift - c_j)) - Y_ij      dI_R += G T_C      dT_C += G^T I_R

A backward that keeps the gradients in registers, as attention's does, does not fit D >= 512: they would fill half the
register file. So a kernel recomputes a tile of logits, makes G of it with one exp and writes that in the features'
dtype to a block of bounded size, and two GEMMs with fp32 accumulation follow, block after block. Positives are 0 in the
block and are added in fp32 by triton_positives.py. Where the forward kept exp(s - shift), the block is made from that,
without a product. No atomics; blocks are added in order. Equations, letters and arguments are those of ops.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import LOG2E, on_device_of
from .options import as_kernels_read, padded_shape, seldom_run, tile_options
from .problem import Logits, Wanted
from .triton_forward import underflows
from .triton_positives import triton_finish
from .triton_tiles import column_offsets, no_positives, products, row_factor, store_tile

# A block of G, and its rows: 1 GiB are 16384 x 32768 numbers in bf16. Each block reads and writes the fp32 gradients of
# its rows and columns: the fewer, the better.
_BLOCK_BYTES = 2**30
_BLOCK_ROWS = 16384
# fp16 ends at 6e-8: G, at most 2, is stored 2^14 times as large, so that entries of 1 / B keep all their bits.
_FP16_FACTOR = 2.0**14
_LEAST_HEIGHT = 32  # of a tile of any kernel here
_RESCALE = {"BLOCK_R": 64, "BLOCK_C": 128, "num_warps": 4}


@triton.jit
def _contrastive_bwd_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    bias_ptr,
    row_code_ptr,
    col_code_ptr,
    row_stat_ptr,
    col_stat_ptr,
    shift_ptr,
    unsafe_ptr,
    block_ptr,  # (rows, columns) of this block
    sums_ptr,  # (row tiles of this block, columns): column sums of G
    image_stride,
    text_stride,
    block_stride,
    first_row,
    first_col,
    last_row,
    last_col,
    num_rows,
    num_cols,
    dim,
    offset,
    SIDES: tl.constexpr,
    ONLINE: tl.constexpr,
    MATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of a block of G, if not `unsafe`; if it is, ONLINE, all tiles by few programs, with an exp more each."""
    if SIDES != "sigmoid" and (tl.load(unsafe_ptr) != 0) != ONLINE:
        return
    tensors = (image_ptr, text_ptr, scale_ptr, bias_ptr, row_code_ptr, col_code_ptr)
    others = (row_stat_ptr, col_stat_ptr, shift_ptr, block_ptr, sums_ptr)
    strides = (image_stride, text_stride, block_stride)
    place = (first_row, first_col, last_row, last_col, num_rows, num_cols, dim, offset)
    if ONLINE:
        tiles = tl.cdiv(last_row - first_row, BLOCK_R)
        for piece in range(tl.program_id(0), tiles * tl.cdiv(last_col - first_col, BLOCK_C), tl.num_programs(0)):
            _gradient_tile(
                piece % tiles, piece // tiles, tensors, others, strides, place,
                SIDES, ONLINE, MATCH, HAS_BIAS, SUMS, FACTOR, PRECISION, BLOCK_R, BLOCK_C, BLOCK_D,
            )  # fmt: skip
    else:
        _gradient_tile(
            tl.program_id(0), tl.program_id(1), tensors, others, strides, place,
            SIDES, ONLINE, MATCH, HAS_BIAS, SUMS, FACTOR, PRECISION, BLOCK_R, BLOCK_C, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _gradient_tile(
    row_tile,
    col_tile,
    tensors,
    others,
    strides,
    place,
    SIDES: tl.constexpr,
    ONLINE: tl.constexpr,
    MATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What `_contrastive_bwd_kernel` does for one tile."""
    image_ptr, text_ptr, scale_ptr, bias_ptr, row_code_ptr, col_code_ptr = tensors
    row_stat_ptr, col_stat_ptr, shift_ptr, block_ptr, sums_ptr = others
    image_stride, text_stride, block_stride = strides
    first_row, first_col, last_row, last_col, num_rows, num_cols, dim, offset = place
    tile_row = first_row + row_tile * BLOCK_R
    tile_col = first_col + col_tile * BLOCK_C
    row = tile_row + tl.arange(0, BLOCK_R)
    left, right = products(
        image_ptr, text_ptr, tile_row, tile_col, num_rows, num_cols, image_stride, text_stride, dim,
        PRECISION, BLOCK_R, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    factor = tl.load(scale_ptr).to(tl.float32) * LOG2E
    shift = tl.load(shift_ptr).to(tl.float32)
    width = last_col - first_col
    for half in tl.static_range(2):
        half_col = tile_col + half * (BLOCK_C // 2)
        col = half_col + tl.arange(0, BLOCK_C // 2)
        if half == 0:
            x = left
        else:
            x = right
        x = x * factor + column_offsets(bias_ptr, col, num_cols, shift, HAS_BIAS)[None, :]
        if SIDES == "sigmoid":
            gradient = 1.0 / (1.0 + tl.exp2(-x))
        elif ONLINE:
            row_stat = tl.load(row_stat_ptr + row, mask=row < num_rows, other=float("inf"))
            gradient = tl.exp2(x + ((shift - row_stat) * LOG2E)[:, None])
            if SIDES == "both":
                col_stat = tl.load(col_stat_ptr + col, mask=col < num_cols, other=0.0)
                gradient += tl.exp2(x + ((shift - col_stat) * LOG2E)[None, :])
        else:
            weight = row_factor(row_stat_ptr, row, num_rows, shift)[:, None]
            if SIDES == "both":
                weight = weight + row_factor(col_stat_ptr, col, num_cols, shift)[None, :]
            gradient = tl.exp2(x) * weight
        gradient = no_positives(gradient, row_code_ptr, col_code_ptr, row, col, num_rows, num_cols, offset, MATCH)
        if SUMS:
            sums = tl.sum(tl.where((row < last_row)[:, None], gradient, 0.0), 0)
            at = sums_ptr + tl.cast(row_tile, tl.int64) * width + (col - first_col)
            tl.store(at, sums, mask=col < last_col)
        store_tile(block_ptr, block_stride, tile_row - first_row, half_col - first_col, gradient * FACTOR)


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
    SIDES: tl.constexpr,
    MATCH: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of a block of G from what the forward kept, unless that is of no use (`unsafe`)."""
    if tl.load(unsafe_ptr) != 0:
        return
    row = first_row + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = first_col + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < last_row)[:, None] & (col < last_col)[None, :]
    kept_at = kept_ptr + row.to(tl.int64)[:, None] * kept_stride + col[None, :]
    gradient = tl.load(kept_at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr).to(tl.float32)
    weight = row_factor(row_stat_ptr, row, num_rows, shift)[:, None]
    if SIDES == "both":
        weight = weight + row_factor(col_stat_ptr, col, num_cols, shift)[None, :]
    gradient = no_positives(gradient * weight, row_code_ptr, col_code_ptr, row, col, num_rows, num_cols, offset, MATCH)
    block_row, block_col = tl.program_id(0) * BLOCK_R, tl.program_id(1) * BLOCK_C
    store_tile(block_ptr, block_stride, block_row, block_col, gradient)
    if SUMS:
        at = sums_ptr + tl.program_id(0).to(tl.int64) * (last_col - first_col) + (col - first_col)
        tl.store(at, tl.sum(gradient, 0), mask=col < last_col)


def triton_gradients(
    logits: Logits,
    row_stat: Tensor,
    col_stat: Tensor,
    kept: Tensor | None,
    factor: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pair_gradients`."""
    dim = logits.image.shape[1]
    logits = as_kernels_read(logits)
    image, text = logits.image, logits.text
    image_sum = image.new_zeros(image.shape, dtype=torch.float32) if wanted.from_rows else None
    text_sum = text.new_zeros(text.shape, dtype=torch.float32) if wanted.text else None
    col_sum = text.new_zeros((text.shape[0],), dtype=torch.float32) if wanted.bias else None
    if image.shape[0] and text.shape[0]:
        unsafe = None if logits.sides == "sigmoid" else underflows(logits, row_stat, col_stat)
        for rows, cols in _blocks(image, text):
            block, sums = _gradient_block(logits, row_stat, col_stat, unsafe, kept, rows, cols, bias_grad=wanted.bias)
            if image_sum is not None:
                _accumulate(image_sum[rows], block, text[cols])
            if text_sum is not None:
                _accumulate(text_sum[cols], block.T, image[rows])
            if col_sum is not None:
                col_sum[cols] += sums.sum(0)
            del block, sums  # else both live on while the next block is made: another GiB
    problem = (logits, row_stat, col_stat, factor, dim)
    # Empty where nothing is asked for: nothing is launched then. One side's dots are enough.
    image_grad, row_dots, _ = triton_finish(*problem, image_sum, None, rows=True, dots=wanted.scale)
    text_grad, col_dots, bias_grad = triton_finish(
        *problem, text_sum, col_sum, rows=False, dots=wanted.scale and not wanted.from_rows
    )
    dots = row_dots if wanted.from_rows else col_dots
    return image_grad[: None if wanted.image else 0], text_grad, dots.sum() * factor, bias_grad


def _blocks(image: Tensor, text: Tensor) -> list[tuple[slice, slice]]:
    """Rows and columns of every block of G."""
    (num_rows, _), num_cols = image.shape, text.shape[0]
    height = min(num_rows, _BLOCK_ROWS)
    width = max(256, _BLOCK_BYTES // (image.element_size() * padded_shape(height, 0)[0]) // 256 * 256)
    return [
        (slice(r, min(r + height, num_rows)), slice(c, min(c + width, num_cols)))
        for r in range(0, num_rows, height)
        for c in range(0, num_cols, width)
    ]


def _gradient_block(
    logits: Logits,
    row_stat: Tensor,
    col_stat: Tensor,
    unsafe: Tensor | None,
    kept: Tensor | None,
    rows: slice,
    cols: slice,
    *,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """G without its positives, (rows, columns) in the features' dtype, and column sums of it, a row a tile of rows."""
    image, text, sides = logits.image, logits.text, logits.sides
    height, width = rows.stop - rows.start, cols.stop - cols.start
    block = image.new_empty(padded_shape(height, width))[:height, :width]
    # Zeros: one of two kernels writes, and their tiles differ.
    sums = image.new_zeros((triton.cdiv(height, _LEAST_HEIGHT) if bias_grad else 0, width), dtype=torch.float32)
    tensors = (*logits.codes, row_stat, col_stat, logits.shift, unsafe, block, sums)
    place = (rows.start, cols.start, rows.stop, cols.stop, image.shape[0], text.shape[0])
    choices = {"SIDES": sides, "MATCH": logits.matches is not None, "SUMS": bias_grad}
    with on_device_of(image):
        if kept is not None:
            _rescale_kept(kept, tensors, (*place, logits.offset), **choices)
        for online in _forms(sides, kept is not None):
            options = _options(image.dtype, launch.gpu_generation(image), sides, logits.bias is not None, online)
            grid = _grid(height, width, options)
            _contrastive_bwd_kernel[seldom_run(image, grid[0] * grid[1]) if online else grid](
                *(image, text, logits.scale, logits.bias, *tensors),
                *(image.stride(0), text.stride(0), block.stride(0), *place, image.shape[1], logits.offset),
                ONLINE=online,
                HAS_BIAS=logits.bias is not None,
                FACTOR=_block_factor(image.dtype),
                **choices,
                **options,
            )
    return block, sums


def _rescale_kept(kept: Tensor, tensors: tuple[Tensor | None, ...], place: tuple[int, ...], **choices: Any) -> None:
    """Fill a block of G. tensors: the codes to the sums; place: first_row to offset; choices: flags of the kernel."""
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


def _forms(sides: str, kept: bool) -> tuple[bool, ...]:
    """Values of ONLINE to launch: a flag on the device decides which of two does the work."""
    return (False,) if sides == "sigmoid" else (True,) if kept else (False, True)


def _options(dtype: torch.dtype, generation: int, sides: str, bias: bool, online: bool) -> dict[str, Any]:
    return tile_options(dtype, generation, small=online, narrow=sides != "sigmoid" and bias)


def _grid(height: int, width: int, options: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(height, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_C"])


def _block_factor(dtype: torch.dtype) -> float:
    return _FP16_FACTOR if dtype == torch.float16 else 1.0


def _accumulate(total: Tensor, block: Tensor, features: Tensor) -> None:
    """total (n, D) fp32 += block (n, m) features (m, D)."""
    alpha = 1 / _block_factor(block.dtype)
    if block.is_cuda and block.dtype != torch.float32:
        torch.addmm(total, block, features, out_dtype=torch.float32, alpha=alpha, out=total)
    else:
        total.addmm_(block.float(), features.float(), alpha=alpha)
