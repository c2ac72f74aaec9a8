"""The Triton forward of slot attention: which kernel runs, over how many programs, and the kernel for every case.

A program holds the outputs of one image and head: a tile of tokens gives the scores of all T queries, their softmax,
and its share of s and A^T v; nothing grows with N. The kernel of slot_attention_one_pass.py does so for half-precision
tokens that are keys and values, the model's case. The one here takes any input with T <= 64 and D <= 1024, but a slice
of the channels a program, with the scores computed anew for each. Few images leave most of the GPU idle: their tokens
then split over several programs, whose sums `_combine_kernel` adds; in a fixed order, so that results repeat.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LOG2E, gpu_generation, on_device_of, readable
from .compile_check import Case
from .slot_attention_one_pass import (
    _slot_attention_one_pass_fwd_kernel,
    forward_case,
    one_pass_options,
    over_tokens,
    softmax_over_queries,
)

COMBINE_BLOCK = 256  # channels a program of `_combine_kernel`


@triton.jit
def _slot_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    mass_ptr,
    map_ptr,
    entropy_ptr,
    value_sum_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_g,
    k_stride_n,
    v_stride_b,
    v_stride_g,
    v_stride_n,
    num_heads,
    heads_per_group,
    num_queries,
    num_tokens,
    split_tokens,
    dim,
    scale,
    eps,
    norm_eps,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    STORE_MAP: tl.constexpr,
    STORE_ENTROPY: tl.constexpr,
    PARTIAL: tl.constexpr,  # this program sees some of the tokens: store plain sums, for `_combine_kernel`
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # channels of one step of the scores' sum
    BLOCK_V: tl.constexpr,  # channels of the output that this program owns
):
    row = tl.program_id(0).to(tl.int64)  # image * num_heads + head; B * T * D elements pass 2**31 in real batches
    image = row // num_heads
    head = row % num_heads
    group = head // heads_per_group
    t = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    leads = tl.program_id(1) == 0  # stores what does not depend on the channels
    split = tl.program_id(2)
    query_in = t < num_queries
    channel_in = channel < dim
    # Padded and absent queries take no share of the softmax over queries.
    present = query_in
    if HAS_MASK:
        present &= tl.load(mask_ptr + image * num_queries + t, mask=query_in, other=0) != 0
    bias = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row * num_queries + t, mask=query_in, other=0.0) * LOG2E
    bias = tl.where(present, bias, float("-inf"))

    q_rows = q_ptr + image * q_stride_b + head * q_stride_h + t.to(tl.int64)[:, None] * q_stride_t + d[None, :]
    k_base = k_ptr + image * k_stride_b + group * k_stride_g
    v_base = v_ptr + image * v_stride_b + group * v_stride_g
    out = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    mean_part = tl.zeros((BLOCK_T,), tl.float32)  # sum_n of what the tokens' means contribute to A^T v
    value_sum = tl.zeros((BLOCK_V,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)  # in bits
    map_rows = map_ptr + row * num_queries * num_tokens
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, num_tokens)
    for start in range(first, last, BLOCK_N):
        token = start + n
        token_in = token < last
        k_rows = k_base + token.to(tl.int64)[:, None] * k_stride_n + d[None, :]
        scores = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        query_sum = tl.zeros((BLOCK_T,), tl.float32)
        mean = tl.zeros((BLOCK_N,), tl.float32)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for offset in range(0, dim, BLOCK_D):
            in_dim = (offset + d < dim)[None, :]
            q = tl.load(q_rows + offset, mask=query_in[:, None] & in_dim, other=0.0)
            k = tl.load(k_rows + offset, mask=token_in[:, None] & in_dim, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            if HAS_NORM:
                # A chunk's mean and squares, joined to those so far (Chan et al. 1979): exact at any offset.
                raw = k.to(tl.float32)
                count = tl.minimum(dim - offset, BLOCK_D)
                chunk_mean = tl.sum(raw, 1) / count
                centred = tl.where(in_dim, raw - chunk_mean[:, None], 0.0)
                gap = chunk_mean - mean
                share = count / (offset + count)
                squares += tl.sum(centred * centred, 1) + gap * gap * offset * share
                mean += gap * share
                query_sum += tl.sum(q.to(tl.float32), 1)
        if HAS_NORM:
            rstd = tl.rsqrt(squares / dim + norm_eps)
            scores = (scores - query_sum[:, None] * mean[None, :]) * rstd[None, :]
        assignment, terms = softmax_over_queries(scores * (scale * LOG2E) + bias[:, None], 0)
        assignment = tl.where(token_in[None, :], assignment, 0.0)
        mass += tl.sum(assignment, 1)
        if STORE_ENTROPY:
            entropy += tl.where(token_in, tl.sum(terms, 0), 0.0)
        if STORE_MAP:
            entry = t[:, None] * num_tokens + token[None, :]
            tl.store(map_rows + entry, assignment, mask=(query_in[:, None] & token_in[None, :]) & leads)
        v_rows = v_base + token.to(tl.int64)[:, None] * v_stride_n + channel[None, :]
        v = tl.load(v_rows, mask=token_in[:, None] & channel_in[None, :], other=0.0)
        if HAS_NORM:
            # (v - mean) rstd, with rstd in the weights. The correction uses the weights as the dot rounds them: else
            # their rounding times the mean stays in the result (bf16, mean at 5 sigma: error 6.9e-3, not 3.1e-3).
            rounded = (assignment * rstd[None, :]).to(v.dtype)
            mean_part += tl.sum(rounded.to(tl.float32) * mean[None, :], 1)
        else:
            rounded = assignment.to(v.dtype)
        out = tl.dot(rounded, v, out, input_precision=PRECISION)
        if NORMALIZE == "mean":
            values = v.to(tl.float32)
            if HAS_NORM:
                values = tl.where(token_in[:, None], (values - mean[:, None]) * rstd[:, None], 0.0)
            value_sum += tl.sum(values, 0)

    if HAS_NORM:
        out -= mean_part[:, None]
    part = split * tl.num_programs(0) + row  # row, unless PARTIAL
    if not PARTIAL:
        out = over_tokens(out, mass[:, None], value_sum[None, :], num_tokens, eps, NORMALIZE)
        out = tl.where(present[:, None], out, 0.0)
    elif NORMALIZE == "mean":
        tl.store(value_sum_ptr + part * dim + channel, value_sum, mask=channel_in)
    out_rows = out_ptr + (part * num_queries + t[:, None]) * dim + channel[None, :]
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=query_in[:, None] & channel_in[None, :])
    tl.store(mass_ptr + part * num_queries + t, mass, mask=query_in & leads)
    if STORE_ENTROPY:
        tl.store(entropy_ptr + part, tl.sum(entropy, 0) / LOG2E, mask=leads)


@triton.jit
def _combine_kernel(
    sums_ptr,  # A^T v, mass and sum_n v_n of every split; (splits, B * H, T, D), (splits, B * H, T), (splits, B * H, D)
    masses_ptr,
    value_sums_ptr,
    mask_ptr,
    out_ptr,
    mass_ptr,
    splits,
    num_heads,
    num_queries,
    num_tokens,
    dim,
    eps,
    NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)  # (image * num_heads + head) * num_queries + query
    row = slot // num_queries
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel_in = channel < dim
    rows = tl.num_programs(0) // num_queries
    out = tl.zeros((BLOCK_D,), tl.float32)
    value_sum = tl.zeros((BLOCK_D,), tl.float32)
    mass = 0.0
    for split in range(0, splits):
        part = split * rows
        mass += tl.load(masses_ptr + part * num_queries + slot)
        out += tl.load(sums_ptr + (part * num_queries + slot) * dim + channel, mask=channel_in, other=0.0)
        if NORMALIZE == "mean":
            value_sum += tl.load(value_sums_ptr + (part + row) * dim + channel, mask=channel_in, other=0.0)
    out = over_tokens(out, mass, value_sum, num_tokens, eps, NORMALIZE)
    if HAS_MASK:
        present = tl.load(mask_ptr + row // num_heads * num_queries + slot % num_queries)
        out = tl.where(present != 0, out, 0.0)
    tl.store(out_ptr + slot * dim + channel, out.to(out_ptr.dtype.element_ty), mask=channel_in)
    tl.store(mass_ptr + slot, mass, mask=tl.program_id(1) == 0)


def _launch_options(
    num_queries: int, dim: int, dtype: torch.dtype, *, norm: bool, normalize: str, generation: int
) -> dict[str, Any]:
    """Blocks, warps and stages, chosen so that no configuration of `compile_cases` spills a register.

    Channels beyond BLOCK_V go to further programs, which compute the scores again from tokens that are in cache then.
    """
    full = dtype == torch.float32  # at full precision the tensor cores are out, and operands sit in registers
    extras = norm or normalize == "mean"  # statistics and the plain sum of the values live beside the accumulator
    block_t = max(16, triton.next_power_of_2(num_queries))
    block_v = min(max(32 if full else 16, triton.next_power_of_2(dim)), (8192 if full or extras else 16384) // block_t)
    narrow = block_v <= 64  # room for more tokens a step
    # Tuned for no spills only: in full precision, 32 channels with the sum of the values beside them are too many.
    few = block_t != 32 or (normalize == "mean" and not norm)
    # Blackwell: Triton 3.6 puts products of 64 rows on the tensor cores, "ieee" or not, where one TF32 product has 10
    # bits; three have 21.
    thrice = block_t == 64 and generation >= 10
    options = {
        "PRECISION": "tf32" if not full else "tf32x3" if thrice else "ieee",
        "BLOCK_T": block_t,
        "BLOCK_N": 16 if full else 64 if narrow else 32,
        "BLOCK_D": min(block_v, 128) if not full else 16 if few else 32,
        "BLOCK_V": block_v,
        "num_warps": 8,
        "num_stages": 2,
    }
    if narrow and (full or extras):
        options["maxnreg"] = 255  # else ptxas aims at 80 or 128 registers, and spills to get there
    return options


def multiprocessors(x: Tensor) -> int:
    """How many programs run at once on the device of `x`, one each; 1 in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may use on the device of `x`; an H100's in the interpreter."""
    return _shared_memory(x.device.index) if x.is_cuda else 232448


@functools.cache
def _shared_memory(device_index: int) -> int:
    limit: int = triton.runtime.driver.active.utils.get_device_properties(device_index)["max_shared_mem"]
    return limit


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    return_map: bool,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`core` (slot_attention_core.py) on a GPU, or interpreted."""
    batch, heads, num_queries, dim = q.shape
    groups, num_tokens = k.shape[1:3]
    norm = norm_eps is not None
    one_pass = None
    if v is None:
        one_pass = one_pass_options(
            num_queries, dim, q.dtype, normalize=normalize, norm=norm, return_map=return_map, limit=shared_memory(q)
        )
    options = one_pass or _launch_options(
        num_queries, dim, q.dtype, norm=norm, normalize=normalize, generation=gpu_generation(q)
    )
    slices = 1 if one_pass else triton.cdiv(dim, options["BLOCK_V"])
    splits, split_tokens = _splits(q, batch * heads * slices, num_tokens, options["BLOCK_N"])
    partial = splits > 1

    def empty(*shape: int, wanted: bool = True) -> Tensor:
        return q.new_empty(shape if wanted else 0, dtype=torch.float32)

    out = q.new_empty(batch, heads, num_queries, dim)
    assignment = empty(batch, heads, num_queries, num_tokens, wanted=return_map)
    mass = empty(splits, batch, heads, num_queries)
    entropy = empty(splits, batch, heads, wanted=return_entropy)
    sums = empty(splits, batch, heads, num_queries, dim) if partial else out
    value_sum = empty(splits, batch, heads, dim) if partial and normalize == "mean" else None
    if batch == 0:
        return out, mass[0], assignment, entropy[0] if return_entropy else entropy
    q, k, values = readable(q), readable(k), readable(k if v is None else v)
    bias = bias if bias is None else bias.contiguous()
    mask = mask if mask is None else mask.contiguous().view(torch.uint8)
    outputs = (sums, mass, assignment, entropy, value_sum)
    strides = (*q.stride()[:3], *k.stride()[:3])
    numbers = (heads, heads // groups, num_queries, num_tokens, split_tokens, dim, scale, eps, norm_eps or 0.0)
    flags = {
        "NORMALIZE": normalize,
        "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None,
        "HAS_NORM": norm,
        "STORE_MAP": return_map,
        "STORE_ENTROPY": return_entropy,
        "PARTIAL": partial,
    }
    with on_device_of(q):
        if one_pass:
            query_sum = q.sum(-1, dtype=torch.float32).contiguous() if norm else None
            _slot_attention_one_pass_fwd_kernel[(batch * heads, splits)](
                q, k, bias, mask, query_sum, *outputs, *strides, *numbers, **flags, **options
            )
        else:
            strides += values.stride()[:3]
            _slot_attention_fwd_kernel[(batch * heads, slices, splits)](
                q, k, values, bias, mask, *outputs, *strides, *numbers, **flags, **options
            )
        if partial:
            mass = _combine(sums, mass, value_sum, mask, out, num_tokens, normalize, eps)
            entropy = entropy.sum(0, keepdim=True) if return_entropy else entropy
    return out, mass[0], assignment, entropy[0] if return_entropy else entropy


def _splits(q: Tensor, programs: int, num_tokens: int, block_n: int) -> tuple[int, int]:
    """Over how many programs an image's tokens split, and how many tokens each takes: one wave, if it is not full."""
    tiles = triton.cdiv(num_tokens, block_n)
    split_tiles = triton.cdiv(tiles, max(1, multiprocessors(q) // max(1, programs)))
    return triton.cdiv(tiles, split_tiles), split_tiles * block_n


def _combine(
    sums: Tensor,
    masses: Tensor,
    value_sum: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    num_tokens: int,
    normalize: str,
    eps: float,
) -> Tensor:
    """Add the splits' sums, normalise them into `out`; the mass, (1, B, H, T)."""
    splits, batch, heads, num_queries, dim = sums.shape
    mass = torch.empty_like(masses[:1])
    _combine_kernel[(batch * heads * num_queries, triton.cdiv(dim, COMBINE_BLOCK))](
        *(sums, masses, value_sum, mask, out, mass),
        *(splits, heads, num_queries, num_tokens, dim, eps),
        NORMALIZE=normalize,
        HAS_MASK=mask is not None,
        BLOCK_D=COMBINE_BLOCK,
    )
    return mass


def compile_cases() -> Iterator[Case]:
    """The configurations that `compile_check` compiles: separate keys and values, and corners of the shapes."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, num_queries, dim, norm, optional, generation in (
        (bf16, 20, 768, False, False, None),
        (bf16, 20, 768, False, True, None),
        (bf16, 20, 64, False, True, None),
        (fp16, 20, 384, False, True, None),
        (bf16, 1, 16, True, True, None),
        (bf16, 64, 1024, True, True, None),
        (fp32, 20, 768, True, True, None),
        (fp32, 64, 1024, True, True, 8),
        (fp32, 64, 1024, True, True, 9),
        (fp32, 64, 1024, True, True, 10),
    ):
        normalize = "mean" if optional else "den"
        options = _launch_options(num_queries, dim, dtype, norm=norm, normalize=normalize, generation=generation or 9)
        kernel = _slot_attention_fwd_kernel
        case = forward_case(kernel, dtype, num_queries, dim, options, norm=norm, optional=optional)
        yield replace(case, generation=generation)
    yield Case(
        name="slot_attention fwd combine",
        kernel=_combine_kernel,
        types=dict.fromkeys(("sums_ptr", "masses_ptr", "value_sums_ptr", "mass_ptr"), "*fp32")
        | {"out_ptr": "*bf16", "mask_ptr": "*u8", "eps": "fp32"}
        | dict.fromkeys(("splits", "num_heads", "num_queries", "num_tokens", "dim"), "i32"),
        constants={"NORMALIZE": "mean", "HAS_MASK": True, "BLOCK_D": COMBINE_BLOCK},
        divisible=("sums_ptr", "masses_ptr", "value_sums_ptr", "out_ptr", "mass_ptr", "dim"),
        options={"num_warps": 4, "num_stages": 3},
        tensor_core=False,
    )
