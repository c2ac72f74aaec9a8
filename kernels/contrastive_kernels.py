"""Triton kernel of the contrastive loss's statistics, its launcher and the configurations that are compile-checked.

A program keeps a tile of logits in registers, with fp32 accumulation, and reduces it to row and column sums. It writes
one number a row for every span of columns and one a column for every tile of rows; these are added up in a fixed order:
no atomics, results repeat bit by bit. The R C logits never reach memory. Equations, letters and arguments are those of
contrastive_statistics.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LOG2E, on_device_of
from .compile_check import Case

# Tiles of rows that write their column sums before these are added up: bounds the buffer to 128 numbers a column.
_PANEL = 128


@triton.jit
def _contrastive_statistics_fwd_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    bias_ptr,
    row_ids_ptr,
    col_ids_ptr,
    row_weight_ptr,
    col_weight_ptr,
    row_lse_ptr,  # (R, spans): a span's share
    target_ptr,  # (R, spans)
    col_lse_ptr,  # (row tiles of this panel, C): a row tile's share
    image_stride,
    text_stride,
    first_row,
    num_rows,
    num_cols,
    dim,
    offset,
    span,
    num_spans,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows against the `span` columns of one span, a tile of BLOCK_C columns at a time."""
    panel_tile = tl.program_id(0)
    span_index = tl.program_id(1)
    row = first_row + panel_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    row_in = row < num_rows
    row64 = row.to(tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    row_weight = tl.load(row_weight_ptr + row64, mask=row_in, other=0.0)
    if MODE != "diagonal":
        row_id = tl.load(row_ids_ptr + row64, mask=row_in, other=0)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    target = tl.zeros((BLOCK_R,), tl.float32)
    span_start = span_index * span
    for start in range(span_start, tl.minimum(span_start + span, num_cols), BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)
        col_in = col < num_cols
        col64 = col.to(tl.int64)
        logits = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for d_start in range(0, dim, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            d_in = d < dim
            image = tl.load(
                image_ptr + row64[:, None] * image_stride + d[None, :], mask=row_in[:, None] & d_in[None, :], other=0.0
            )
            text = tl.load(
                text_ptr + col64[None, :] * text_stride + d[:, None], mask=col_in[None, :] & d_in[:, None], other=0.0
            )
            logits = tl.dot(image, text, logits, input_precision=PRECISION)
        logits *= scale
        if HAS_BIAS:
            logits += tl.load(bias_ptr + col64, mask=col_in, other=0.0).to(tl.float32)[None, :]

        counted = row_in[:, None] & col_in[None, :]
        positive = (row + offset)[:, None] == col[None, :]
        if MODE != "diagonal":
            same = row_id[:, None] == tl.load(col_ids_ptr + col64, mask=col_in, other=0)[None, :]
            if MODE == "mask":
                counted = counted & (positive | (same == 0))
            else:
                positive = positive | same
        col_weight = tl.load(col_weight_ptr + col64, mask=col_in, other=0.0)
        weight = row_weight[:, None] + col_weight[None, :]
        target += tl.sum(tl.where(positive & counted, logits * weight, 0.0), 1)

        # The shift is subtracted before log2(e) is multiplied in: at |s| = 100 the product alone would lose 8e-6.
        logits = tl.where(counted, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # A row of -inf alone has no finite shift; with 0 its sum is 0 instead of NaN.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp2((largest - shift) * LOG2E) + tl.sum(tl.exp2((logits - shift[:, None]) * LOG2E), 1)
        largest = new_largest
        if COLUMNS:
            col_largest = tl.max(logits, 0)
            col_shift = tl.where(col_largest == float("-inf"), 0.0, col_largest)
            col_total = tl.sum(tl.exp2((logits - col_shift[None, :]) * LOG2E), 0)
            col_lse = _shifted_log(col_shift, col_total)
            tl.store(col_lse_ptr + panel_tile.to(tl.int64) * num_cols + col64, col_lse, mask=col_in)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(row_lse_ptr + row64 * num_spans + span_index, _shifted_log(shift, total), mask=row_in)
    tl.store(target_ptr + row64 * num_spans + span_index, target, mask=row_in)


@triton.jit
def _shifted_log(shift, total):
    """shift + ln(total), -inf where total is 0 (the largest term of a sum that has one is 1)."""
    return tl.where(total > 0.0, shift + tl.log(tl.maximum(total, 1.0)), float("-inf"))


def _launch_options(dtype: torch.dtype) -> dict[str, Any]:
    """Blocks, warps and stages: tiles with which no configuration of `compile_cases` spills (128 x 128 ones do)."""
    if dtype == torch.float32:  # at full precision the tensor cores are out: TF32 would miss s by 0.05 at scale 100
        return {"PRECISION": "ieee", "BLOCK_R": 32, "BLOCK_C": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    return {"PRECISION": "tf32", "BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}


def triton_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor,
    offset: int,
    mode: str,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, dim = image.shape
    num_cols = text.shape[0]
    col_lse = image.new_full((num_cols if columns else 0,), -torch.inf, dtype=torch.float32)
    if num_rows == 0 or num_cols == 0:
        return image.new_full((num_rows,), -torch.inf, dtype=torch.float32), col_lse, row_weight.new_zeros((num_rows,))
    options = _launch_options(image.dtype)
    block_r, block_c = options["BLOCK_R"], options["BLOCK_C"]
    row_tiles, col_tiles = triton.cdiv(num_rows, block_r), triton.cdiv(num_cols, block_c)
    # Long spans write fewer partial sums, short ones fill the GPU: at least ~512 programs where there are enough tiles.
    span = block_c * max(1, min(32, min(row_tiles, _PANEL) * col_tiles // 512))
    num_spans = triton.cdiv(num_cols, span)
    row_part = image.new_empty((num_rows, num_spans), dtype=torch.float32)
    target_part = torch.empty_like(row_part)
    col_part = image.new_empty((min(row_tiles, _PANEL) if columns else 0, num_cols), dtype=torch.float32)
    image, text = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (image, text))
    for first in range(0, row_tiles, _PANEL):
        tiles = min(_PANEL, row_tiles - first)
        with on_device_of(image):
            _contrastive_statistics_fwd_kernel[(tiles, num_spans)](
                image,
                text,
                scale,
                bias if bias is None else bias.contiguous(),
                row_ids if row_ids is None else row_ids.contiguous(),
                col_ids if col_ids is None else col_ids.contiguous(),
                row_weight,
                col_weight,
                row_part,
                target_part,
                col_part,
                image.stride(0),
                text.stride(0),
                first * block_r,
                num_rows,
                num_cols,
                dim,
                offset,
                span,
                num_spans,
                MODE="diagonal" if row_ids is None else mode,
                HAS_BIAS=bias is not None,
                COLUMNS=columns,
                **options,
            )
        if columns:
            col_lse = torch.logaddexp(col_lse, col_part[:tiles].logsumexp(0))
    return row_part.logsumexp(1), col_lse, target_part.sum(1)


def compile_cases() -> Iterator[Case]:
    """The configurations that `compile_check` compiles."""
    counts = ("image_stride", "text_stride", "first_row", "num_rows", "num_cols", "dim", "offset", "span", "num_spans")
    for dtype, mode, bias, columns in (
        (torch.bfloat16, "diagonal", False, True),
        (torch.bfloat16, "share", True, True),
        (torch.bfloat16, "mask", True, False),
        (torch.float32, "share", True, True),
    ):
        element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        options = _launch_options(dtype)
        pointers = {"image_ptr": f"*{element}", "text_ptr": f"*{element}"}
        pointers |= dict.fromkeys(("scale_ptr", "row_weight_ptr", "col_weight_ptr"), "*fp32")
        pointers |= dict.fromkeys(("row_lse_ptr", "target_ptr", "col_lse_ptr"), "*fp32")
        if bias:
            pointers |= {"bias_ptr": "*fp32"}
        if mode != "diagonal":
            pointers |= {"row_ids_ptr": "*i64", "col_ids_ptr": "*i64"}
        yield Case(
            name=f"contrastive_loss fwd {element} {mode}{' bias' * bias}{' both sides' * columns}",
            kernel=_contrastive_statistics_fwd_kernel,
            types=pointers | dict.fromkeys(counts, "i32"),
            constants={"bias_ptr": None, "row_ids_ptr": None, "col_ids_ptr": None}
            | {"MODE": mode, "HAS_BIAS": bias, "COLUMNS": columns}
            | {key: value for key, value in options.items() if key.isupper()},
            divisible=(*pointers, "image_stride", "text_stride", "first_row", "dim", "span"),
            options={key: options[key] for key in ("num_warps", "num_stages")},
            tensor_core=dtype != torch.float32,
        )
