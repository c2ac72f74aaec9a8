"""Triton forward of the contrastive losses: row and column sums of exp(logits), one pass over tiles, and its launcher.

A program keeps a tile of logits in registers, with fp32 accumulation, takes one exp2 an element and adds rows and
columns up. It writes a number a row for every span of columns and a number a column for every tile of rows; a second
kernel adds these up in a fixed order: no atomics, results repeat bit by bit. The R C logits never reach memory, unless
the caller keeps exp(s - shift) in bf16 for the backward.

One exp serves rows and columns because all share one shift. Where that makes a sum underflow (all cosines of a row
near -1 at a scale near 100), a flag on the device lets a second pass run that shifts by each row's and column's own
maximum; else its programs, a few a multiprocessor, return at once. The host never waits. Equations, letters and
arguments are those of ops.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import LOG2E, on_device_of
from .options import as_kernels_read, seldom_run, tile_options
from .problem import Logits
from .triton_positives import triton_target
from .triton_tiles import column_offsets, finite, log_of_sum, products, same_ids, store_tile

# Numbers in the buffer of column sums, one for every tile of rows and column: 128 MiB, whatever the batch.
_PANEL_NUMBERS = 2**25
# So many programs at least where there are as many tiles: 15 waves of the 132 multiprocessors of an H200.
_PROGRAMS = 2048
_SUMS = {"PARTS": 16, "BLOCK": 64, "num_warps": 4}
# A sum below exp(shift - this) may have lost terms that count: those below exp(-87), the least fp32 number. 2^20 of
# them are exp(-87 + 55 + 14) of it.
UNDERFLOW = 55.0


@triton.jit
def _contrastive_fwd_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    bias_ptr,
    row_code_ptr,
    col_code_ptr,
    shift_ptr,
    unsafe_ptr,
    row_part_ptr,  # (spans, rows of this panel): a span's share
    col_part_ptr,  # (row tiles of this panel, C): a row tile's share
    kept_ptr,  # (R, C), padded
    image_stride,
    text_stride,
    kept_stride,
    first_row,
    panel_rows,
    num_rows,
    num_cols,
    dim,
    offset,
    span,
    SIDES: tl.constexpr,
    ONLINE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows against the `span` columns of one span, a tile of BLOCK_C columns at a time.

    Writes sums of exp(s - shift), or of softplus(s) for SIDES "sigmoid". With ONLINE it writes their logarithms, if
    `unsafe`, and programs go through all of the panel, however few they are.
    """
    tensors = (image_ptr, text_ptr, scale_ptr, bias_ptr, row_code_ptr, col_code_ptr, shift_ptr)
    results = (row_part_ptr, col_part_ptr, kept_ptr)
    sizes = (image_stride, text_stride, kept_stride, first_row, panel_rows, num_rows, num_cols, dim, offset, span)
    if ONLINE:
        if tl.load(unsafe_ptr) == 0:
            return
        tiles = tl.minimum(panel_rows // BLOCK_R, tl.cdiv(num_rows - first_row, BLOCK_R))
        for piece in range(tl.program_id(0), tiles * tl.cdiv(num_cols, span), tl.num_programs(0)):
            _span_sums(
                piece % tiles, piece // tiles, tensors, results, sizes,
                SIDES, ONLINE, MASKED, HAS_BIAS, KEEP, PRECISION, BLOCK_R, BLOCK_C, BLOCK_D,
            )  # fmt: skip
    else:
        _span_sums(
            tl.program_id(0), tl.program_id(1), tensors, results, sizes,
            SIDES, ONLINE, MASKED, HAS_BIAS, KEEP, PRECISION, BLOCK_R, BLOCK_C, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _span_sums(
    tile,
    span_index,
    tensors,
    results,
    sizes,
    SIDES: tl.constexpr,
    ONLINE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What `_contrastive_fwd_kernel` does for one tile of rows and one span."""
    image_ptr, text_ptr, scale_ptr, bias_ptr, row_code_ptr, col_code_ptr, shift_ptr = tensors
    row_part_ptr, col_part_ptr, kept_ptr = results
    image_stride, text_stride, kept_stride, first_row, panel_rows, num_rows, num_cols, dim, offset, span = sizes
    tile_row = first_row + tile * BLOCK_R
    row = tile_row + tl.arange(0, BLOCK_R)
    factor = tl.load(scale_ptr).to(tl.float32) * LOG2E
    shift = tl.load(shift_ptr).to(tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    span_start = span_index * span
    for start in range(span_start, tl.minimum(span_start + span, num_cols), BLOCK_C):
        left, right = products(
            image_ptr, text_ptr, tile_row, start, num_rows, num_cols, image_stride, text_stride, dim,
            PRECISION, BLOCK_R, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        for half in tl.static_range(2):
            first_col = start + half * (BLOCK_C // 2)
            col = first_col + tl.arange(0, BLOCK_C // 2)
            if half == 0:
                x = left
            else:
                x = right
            x = x * factor + column_offsets(bias_ptr, col, num_cols, shift, HAS_BIAS)[None, :]
            counted = (row < num_rows)[:, None]
            if MASKED:
                same = same_ids(row_code_ptr, col_code_ptr, row, col, num_rows, num_cols)
                counted = counted & (~same | ((row + offset)[:, None] == col[None, :]))
            x = tl.where(counted, x, float("-inf"))
            col_part_at = col_part_ptr + tl.cast(tile, tl.int64) * num_cols + col
            if ONLINE:
                new_largest = tl.maximum(largest, tl.max(x, 1))
                total = total * tl.exp2(largest - finite(new_largest))
                total += tl.sum(tl.exp2(x - finite(new_largest)[:, None]), 1)
                largest = new_largest
                if SIDES == "both":
                    col_largest = finite(tl.max(x, 0))
                    col_total = tl.sum(tl.exp2(x - col_largest[None, :]), 0)
                    col_lse = log_of_sum(col_largest / LOG2E + shift, col_total)
                    tl.store(col_part_at, col_lse, mask=col < num_cols)
            elif SIDES == "sigmoid":
                total += tl.sum(_softplus(x), 1)
            else:
                e = tl.exp2(x)
                total += tl.sum(e, 1)
                if SIDES == "both":
                    tl.store(col_part_at, tl.sum(e, 0), mask=col < num_cols)
                if KEEP:
                    store_tile(kept_ptr, kept_stride, tile_row, first_col, e)
    if ONLINE:
        total = log_of_sum(finite(largest) / LOG2E + shift, total)
    at = row_part_ptr + tl.cast(span_index, tl.int64) * panel_rows + tile * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(at, total, mask=row < num_rows)


@triton.jit
def _softplus(x):
    """ln(1 + 2^x). Below 2^-5 by its series, where 1 + t would round t away: most pairs have t near exp(-10)."""
    t = tl.exp2(-tl.abs(x))
    series = t * (1.0 - t * (0.5 - t * (0.33333334 - t * 0.25)))
    return tl.maximum(x, 0.0) / LOG2E + tl.where(t < 0.03125, series, tl.log(1.0 + t))


@triton.jit
def _contrastive_sums_kernel(
    part_ptr,  # (parts, stride)
    out_ptr,  # (count,)
    shift_ptr,
    unsafe_ptr,
    parts,
    stride,
    count,
    append,
    FORM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the parts of each of `count` sums added up in order, and the sum so far where `append` is not 0.

    FORM "sum" adds numbers up; "shifted" makes the logarithm of sums of exp(s - shift); "online" takes logarithms, if
    `unsafe`, by however few programs, and leaves `out` alone if not.
    """
    arguments = (part_ptr, out_ptr, shift_ptr, parts, stride, count, append)
    if FORM == "online":
        if tl.load(unsafe_ptr) == 0:
            return
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            _block_of_sums(block, arguments, FORM, PARTS, BLOCK)
    else:
        _block_of_sums(tl.program_id(0), arguments, FORM, PARTS, BLOCK)


@triton.jit
def _block_of_sums(block, arguments, FORM: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """What `_contrastive_sums_kernel` does for BLOCK of the sums."""
    part_ptr, out_ptr, shift_ptr, parts, stride, count, append = arguments
    at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    # Some parts at a time: one by one, the loop would wait for memory as often as there are parts.
    some = tl.arange(0, PARTS)
    from_here = part_ptr + some.to(tl.int64)[:, None] * stride + at[None, :]
    largest = tl.zeros((BLOCK,), tl.float32)
    if FORM == "online":
        largest += float("-inf")
        for first in range(0, parts, PARTS):
            mask = (first + some < parts)[:, None] & inside[None, :]
            term = tl.load(from_here + tl.cast(first, tl.int64) * stride, mask=mask, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(term, 0))
        largest = finite(largest)
    elif FORM == "shifted":
        largest += tl.load(shift_ptr).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, PARTS):
        mask = (first + some < parts)[:, None] & inside[None, :]
        at_first = from_here + tl.cast(first, tl.int64) * stride
        if FORM == "online":
            term = tl.load(at_first, mask=mask, other=float("-inf"))
            total += tl.sum(tl.exp2((term - largest[None, :]) * LOG2E), 0)
        else:
            total += tl.sum(tl.load(at_first, mask=mask, other=0.0), 0)
    result = total
    if FORM != "sum":
        result = log_of_sum(largest, total)
    if append != 0:
        before = tl.load(out_ptr + at, mask=inside, other=0.0)
        largest = finite(tl.maximum(before, result))
        total = tl.exp2((before - largest) * LOG2E) + tl.exp2((result - largest) * LOG2E)
        result = log_of_sum(largest, total)
    tl.store(out_ptr + at, result, mask=inside)


def triton_statistics(logits: Logits, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_statistics`."""
    num_rows, num_cols, sides = logits.image.shape[0], logits.text.shape[0], logits.sides
    nothing = 0.0 if sides == "sigmoid" else -torch.inf
    row_stat = logits.image.new_full((num_rows,), nothing, dtype=torch.float32)
    col_stat = logits.image.new_full((num_cols if sides == "both" else 0,), nothing, dtype=torch.float32)
    if num_rows == 0 or num_cols == 0:
        return row_stat, col_stat, torch.zeros_like(row_stat)
    logits = as_kernels_read(logits)
    _add_up(logits, row_stat, col_stat, kept, None)
    if sides != "sigmoid":
        _add_up(logits, row_stat, col_stat, None, underflows(logits, row_stat, col_stat))
    return row_stat, col_stat, triton_target(logits)


def underflows(logits: Logits, row_stat: Tensor, col_stat: Tensor) -> Tensor:
    """(1,) int32: whether exp(s - shift) is too small for some row or column to be shared by all."""
    least = torch.minimum(row_stat.amin(), col_stat.amin()) if logits.sides == "both" else row_stat.amin()
    return (least < logits.shift - UNDERFLOW).to(torch.int32)


def _add_up(logits: Logits, row_stat: Tensor, col_stat: Tensor, kept: Tensor | None, unsafe: Tensor | None) -> None:
    """Fill row_stat (R,), col_stat (C,) and `kept`; with `unsafe` only if it holds, shifting by maxima."""
    image, text, sides, online = logits.image, logits.text, logits.sides, unsafe is not None
    (num_rows, dim), num_cols = image.shape, text.shape[0]
    options = _options(
        *(image.dtype, launch.gpu_generation(image), sides, logits.positives),
        *(logits.bias is not None, kept is not None, online),
    )
    block_r, block_c = options["BLOCK_R"], options["BLOCK_C"]
    row_tiles, col_tiles = triton.cdiv(num_rows, block_r), triton.cdiv(num_cols, block_c)
    panel = max(1, min(row_tiles, _PANEL_NUMBERS // num_cols))
    # Long spans write fewer sums, short ones fill the GPU.
    span = block_c * max(1, min(16, panel * col_tiles // _PROGRAMS))
    num_spans, panel_rows = triton.cdiv(num_cols, span), panel * block_r
    row_part = image.new_empty((num_spans, panel_rows), dtype=torch.float32)
    col_part = image.new_empty((panel if sides == "both" else 0, num_cols), dtype=torch.float32)
    strides = (image.stride(0), text.stride(0), 0 if kept is None else kept.stride(0))
    form = "sum" if sides == "sigmoid" else "online" if online else "shifted"
    for first in range(0, row_tiles, panel):
        tiles = min(panel, row_tiles - first)
        grid = seldom_run(image, tiles * num_spans) if online else (tiles, num_spans)
        with on_device_of(image):
            _contrastive_fwd_kernel[grid](
                *(image, text, logits.scale, logits.bias, *logits.codes, logits.shift, unsafe),
                *(row_part, col_part, kept),
                *(*strides, first * block_r, panel_rows, num_rows, num_cols, dim, logits.offset, span),
                SIDES=sides,
                ONLINE=online,
                MASKED=logits.positives == "mask",
                HAS_BIAS=logits.bias is not None,
                KEEP=kept is not None,
                **options,
            )
        rows = row_stat[first * block_r : (first + tiles) * block_r]
        _add_up_parts(row_part, rows, num_spans, logits.shift, unsafe, 0, form)
        if sides == "both":
            _add_up_parts(col_part, col_stat, tiles, logits.shift, unsafe, first, form)


def _options(
    dtype: torch.dtype, generation: int, sides: str, positives: str, bias: bool, keep: bool, online: bool
) -> dict[str, Any]:
    narrow = sides != "sigmoid" and (bias or (keep and positives == "mask"))
    return tile_options(dtype, generation, small=online, narrow=narrow)


def _add_up_parts(
    part: Tensor, out: Tensor, parts: int, shift: Tensor, unsafe: Tensor | None, append: int, form: str
) -> None:
    """Fill `out` (n,) from part (>= parts, n) as the kernel says; append, form: its arguments."""
    blocks = triton.cdiv(len(out), _SUMS["BLOCK"])
    with on_device_of(out):
        _contrastive_sums_kernel[seldom_run(out, blocks) if form == "online" else (blocks,)](
            part, out, shift, unsafe, parts, part.stride(0), len(out), append, FORM=form, **_SUMS
        )
