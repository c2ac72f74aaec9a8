"""Triton kernels of slot attention, their launchers and the configurations that are compiled ahead of time.

The forward passes over the tokens once. A program holds the outputs of one image and head for a slice of the channels:
a tile of tokens gives the scores of all T queries, their softmax, and its share of s and A^T v; nothing grows with N.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LOG2E, on_device_of
from .compile_check import Case


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
    dim,
    scale,
    eps,
    norm_eps,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    STORE_MAP: tl.constexpr,
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
    first = tl.program_id(1) == 0
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
    for start in range(0, num_tokens, BLOCK_N):
        token = start + n
        token_in = token < num_tokens
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
        scores = scores * (scale * LOG2E) + bias[:, None]
        top = tl.max(scores, 0)
        top = tl.where(top == float("-inf"), 0.0, top)  # an image without a single query
        exps = tl.exp2(scores - top[None, :])
        total = tl.sum(exps, 0)
        assignment = exps / tl.where(total == 0.0, 1.0, total)[None, :]
        assignment = tl.where(token_in[None, :], assignment, 0.0)
        mass += tl.sum(assignment, 1)
        if STORE_MAP:
            map_row = (row * num_queries + t[:, None]) * num_tokens + token[None, :]
            tl.store(map_ptr + map_row, assignment, mask=(query_in[:, None] & token_in[None, :]) & first)
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
    # eps, mass and their quotient stay fp32: 1e-8 is 0 in fp16 and a query without tokens would give 0 / 0.
    if NORMALIZE == "mean":
        out = (out + eps * value_sum[None, :]) / (mass + num_tokens * eps)[:, None]
    elif NORMALIZE == "den":
        out = out / (mass + eps)[:, None]
    elif NORMALIZE == "l1max":
        out = out / tl.maximum(mass, eps)[:, None]
    out = tl.where(present[:, None], out, 0.0)
    out_row = (row * num_queries + t[:, None]) * dim + channel[None, :]
    tl.store(out_ptr + out_row, out.to(out_ptr.dtype.element_ty), mask=query_in[:, None] & channel_in[None, :])
    tl.store(mass_ptr + row * num_queries + t, mass, mask=query_in & first)


def _launch_options(num_queries: int, dim: int, dtype: torch.dtype, *, norm: bool, normalize: str) -> dict[str, Any]:
    """Blocks, warps and stages, chosen so that no configuration of `compile_cases` spills a register.

    Channels beyond BLOCK_V go to further programs, which compute the scores again from tokens that are in cache then.
    """
    full = dtype == torch.float32  # at full precision the tensor cores are out, and operands sit in registers
    extras = norm or normalize == "mean"  # statistics and the plain sum of the values live beside the accumulator
    block_t = max(16, triton.next_power_of_2(num_queries))
    block_v = min(max(16, triton.next_power_of_2(dim)), (8192 if full or extras else 16384) // block_t)
    narrow = block_v <= 64  # room for more tokens a step
    return {
        "PRECISION": "ieee" if full else "tf32",
        "BLOCK_T": block_t,
        "BLOCK_N": 16 if full else 64 if narrow else 32,
        "BLOCK_D": min(block_v, block_t if full else 128),
        "BLOCK_V": block_v,
        "num_warps": 8,
        "num_stages": 2,
    }


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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_queries, dim = q.shape
    groups, num_tokens = k.shape[1:3]
    out = q.new_empty(batch, heads, num_queries, dim)
    mass = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    map_shape = (batch, heads, num_queries, num_tokens) if return_map else (0,)
    assignment = q.new_empty(map_shape, dtype=torch.float32)
    if batch == 0:
        return out, mass, assignment
    q, k = _unit_stride(q), _unit_stride(k)
    values = k if v is None else _unit_stride(v)
    options = _launch_options(num_queries, dim, q.dtype, norm=norm_eps is not None, normalize=normalize)
    with on_device_of(q):
        _slot_attention_fwd_kernel[(batch * heads, triton.cdiv(dim, options["BLOCK_V"]))](
            q,
            k,
            values,
            bias if bias is None else bias.contiguous(),
            mask if mask is None else mask.contiguous().view(torch.uint8),
            out,
            mass,
            assignment,
            *q.stride()[:3],
            *k.stride()[:3],
            *values.stride()[:3],
            heads,
            heads // groups,
            num_queries,
            num_tokens,
            dim,
            scale,
            eps,
            norm_eps or 0.0,
            NORMALIZE=normalize,
            HAS_BIAS=bias is not None,
            HAS_MASK=mask is not None,
            HAS_NORM=norm_eps is not None,
            STORE_MAP=return_map,
            **options,
        )
    return out, mass, assignment


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any batch, group and row stride, but read channels as contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def compile_cases() -> Iterator[Case]:
    """The configurations that `compile_check` compiles: what the decoder uses, and corners of the allowed shapes."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, num_queries, dim, norm, optional in (
        (bf16, 20, 768, False, False),
        (bf16, 20, 768, True, False),
        (bf16, 20, 768, True, True),
        (fp16, 20, 384, False, True),
        (bf16, 20, 64, False, True),
        (bf16, 1, 16, True, True),
        (bf16, 64, 1024, True, True),
        (fp32, 20, 768, True, True),
        (fp32, 64, 1024, True, True),
    ):
        yield _compile_case(dtype, num_queries, dim, norm=norm, optional=optional)


def _compile_case(dtype: torch.dtype, num_queries: int, dim: int, *, norm: bool, optional: bool) -> Case:
    """`optional`: with bias, mask, exported map and the normaliser that needs most registers."""
    normalize = "mean" if optional else "den"
    options = _launch_options(num_queries, dim, dtype, norm=norm, normalize=normalize)
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), element)
    pointers |= {"mass_ptr": "*fp32", "map_ptr": "*fp32"}
    if optional:
        pointers |= {"bias_ptr": "*fp32", "mask_ptr": "*u8"}
    strides = [f"{x}_stride_{axis}" for x, axes in (("q", "bht"), ("k", "bgn"), ("v", "bgn")) for axis in axes]
    counts = ("num_heads", "heads_per_group", "num_queries", "num_tokens", "dim")
    integers = dict.fromkeys((*strides, *counts), "i32")
    floats = dict.fromkeys(("scale", "eps", "norm_eps"), "fp32")
    name = f"slot_attention fwd {str(dtype).removeprefix('torch.')} T={num_queries} D={dim}"
    return Case(
        name=name + (" norm" if norm else "") + (" mean bias mask map" if optional else ""),
        kernel=_slot_attention_fwd_kernel,
        types=pointers | integers | floats,
        constants={"bias_ptr": None, "mask_ptr": None, "NORMALIZE": normalize, "HAS_NORM": norm}
        | dict.fromkeys(("HAS_BIAS", "HAS_MASK", "STORE_MAP"), optional)
        | {key: value for key, value in options.items() if key.isupper()},
        divisible=(*pointers, *strides, "dim"),
        options={key: options[key] for key in ("num_warps", "num_stages")},
        tensor_core=dtype != torch.float32,
    )
