"""Triton: adds up the shares that tiles of logits have in a row's or a column's sum, in a fixed order.

Equations, letters and `shift` are those of contrastive_ops.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2E, on_device_of
from .triton_tiles import seldom_run

_SUMS = {"PARTS": 16, "BLOCK": 64, "num_warps": 4}


@triton.jit
def finite(largest):
    """`largest`, or 0 where it is -inf: a row without any term has no shift, and with 0 its sum is 0 instead of NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def log_of_sum(shift, total):
    """shift + ln(total), -inf where total is 0; a NaN stays one."""
    return tl.where(total == 0.0, float("-inf"), shift + tl.log(tl.where(total == 0.0, 1.0, total)))


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


def add_up_parts(
    part: Tensor, out: Tensor, parts: int, shift: Tensor, unsafe: Tensor | None, append: int, form: str
) -> None:
    """Fill `out` (n,) from part (>= parts, n) as the kernel says; append, form: its arguments."""
    blocks = triton.cdiv(len(out), _SUMS["BLOCK"])
    with on_device_of(out):
        _contrastive_sums_kernel[seldom_run(out, blocks) if form == "online" else (blocks,)](
            part, out, shift, unsafe, parts, part.stride(0), len(out), append, FORM=form, **_SUMS
        )
