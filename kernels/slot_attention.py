"""Slot attention: queries compete for tokens, then each query averages the tokens it won.

    S = scale * k q^T + bias        A = softmax of S over the T QUERIES        out_t = sum_n W_nt v_n

The softmax runs over queries, so it is local to a token; s_t = sum_n A_nt and A^T v are plain sums: one pass over the
tokens, no running maximum. W is A normalised over the tokens, in one of four ways (`normalize`):

    mean   (A + eps) / (s + N eps)   Locatello et al. 2020 (arXiv 2006.15055), DINOSAUR
    den    A / (s + eps)             SAVi; ECLIP (arXiv 2304.02853) equation 4 with eps in the denominator
    l1max  A / max(s, eps)           multi-head variants
    sum    A                         kMaX-DeepLab

Two public ops. `slot_attention` takes projected keys and values. `slot_attention_absorbed` takes the tokens and both
weights and never builds keys or values: scores = (q W_key) E^T and out = (W^T E) W_value^T, so that an N x D x D
product becomes a T x D x D one, and a block saves its T queries for backward instead of N keys and N values. Both run
on one core op whose forward streams over the tokens: the T x N map reaches device memory only if it is asked for.

Letters: B images, N tokens, T queries, D channels, H heads, G groups (1: all heads read the same tokens; H: a slice
each).
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    LOG2E,
    accumulate_dtype,
    autocast_dtype,
    autocast_off,
    launches_triton,
    on_device_of,
    require,
    require_alike,
)
from .compile_check import Case

Normalize = Literal["mean", "den", "l1max", "sum"]
NORMALIZERS = ("mean", "den", "l1max", "sum")
TokenNorm = tuple[Tensor, Tensor, float]
MAX_KERNEL_QUERIES = 64
MAX_KERNEL_DIM = 1024


# ---------------------------------------------------------------------------------------------------------------------
# Reference: the specification, in plain PyTorch. fp32 inside; float64 stays float64.


def slot_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int = 1,
    normalize: Normalize = "den",
    eps: float = 1e-6,
    scale: float | None = None,
    query_bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_map: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`slot_attention` in plain PyTorch operations; same arguments, shapes and errors, any size."""
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    _check_keys(q, k, v)
    dtype = accumulate_dtype(q.dtype)
    with autocast_off(q):
        queries, keys, values = (x.to(dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = _scale(scale, q, num_heads) * queries @ keys.transpose(-1, -2)  # (B, H, T, N)
        if query_bias is not None:
            scores = scores + query_bias.to(dtype).expand(q.shape[:2])[:, None, :, None]
        absent = None if query_mask is None else ~query_mask[:, None, :, None]
        if absent is not None:
            # The lowest finite number, not -inf: an image without a single query would give NaN in backward.
            scores = scores.masked_fill(absent, torch.finfo(dtype).min)
        assignment = scores.softmax(dim=-2)
        if absent is not None:
            assignment = assignment.masked_fill(absent, 0)
        mass = assignment.sum(-1, keepdim=True)
        if normalize == "mean":
            weights = (assignment + eps) / (mass + k.shape[1] * eps)
        elif normalize == "den":
            weights = assignment / (mass + eps)
        elif normalize == "l1max":
            weights = assignment / mass.clamp_min(eps)
        else:
            weights = assignment
        if absent is not None:
            weights = weights.masked_fill(absent, 0)
        out = (weights @ values).transpose(1, 2).flatten(2).to(q.dtype)
    return (out, _public_map(assignment)) if return_map else out


def slot_attention_absorbed_reference(
    q: Tensor,
    tokens: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    *,
    num_heads: int = 1,
    token_norm: TokenNorm | None = None,
    normalize: Normalize = "den",
    eps: float = 1e-6,
    scale: float | None = None,
    query_bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_map: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`slot_attention_absorbed` the long way round: LayerNorm, both projections, then `slot_attention_reference`."""
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    _check_tokens(q, tokens, w_key, w_value, token_norm)
    dtype = accumulate_dtype(q.dtype)
    with autocast_off(q):
        inputs = tokens.to(dtype)
        if token_norm is not None:
            gamma, beta, norm_eps = token_norm
            inputs = F.layer_norm(inputs, inputs.shape[-1:], gamma.to(dtype), beta.to(dtype), norm_eps)
        result = slot_attention_reference(
            q.to(dtype),
            inputs @ w_key.to(dtype).T,
            inputs @ w_value.to(dtype).T,
            num_heads=num_heads,
            normalize=normalize,
            eps=eps,
            scale=scale,
            query_bias=query_bias,
            query_mask=query_mask,
            return_map=return_map,
        )
    if isinstance(result, tuple):
        return result[0].to(q.dtype), result[1]
    return result.to(q.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The core: out, mass, map = core(q (B,H,T,D), k (B,G,N,D), v (B,G,N,D) or None for v = k).


class _Weights(NamedTuple):
    """What the plain backward recomputes, all (B, H, T, N) or broadcasting to it, in the accumulation dtype."""

    assignment: Tensor
    share: Tensor  # P = A / c
    weights: Tensor  # W


def _fold(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, X) -> (B, G, H/G * T, X): heads of a group become rows of one matmul, not copies of its tokens."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


def _normalized(tokens: Tensor, norm_eps: float | None) -> Tensor:
    tokens = tokens.to(accumulate_dtype(tokens.dtype))
    return tokens if norm_eps is None else F.layer_norm(tokens, tokens.shape[-1:], eps=norm_eps)


def _plain_weights(
    q: Tensor, keys: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, normalize: str, eps: float
) -> tuple[_Weights, Tensor]:
    """Assignment, its normalised forms, and the mass s (B, H, T), from queries and (already normalised) keys."""
    batch, heads, num_queries, _ = q.shape
    num_tokens = keys.shape[2]
    scores = _fold(q.to(keys.dtype) * scale, keys.shape[1]) @ keys.transpose(-1, -2)
    scores = scores.view(batch, heads, num_queries, num_tokens)
    if bias is not None:
        scores = scores + bias[..., None]
    absent = None if mask is None else ~mask[:, None, :, None]
    if absent is not None:
        scores = scores.masked_fill(absent, torch.finfo(scores.dtype).min)
    assignment = scores.softmax(dim=-2)
    if absent is not None:
        assignment = assignment.masked_fill(absent, 0)
    mass = assignment.sum(-1)
    total = mass[..., None]
    if normalize == "mean":
        total = total + num_tokens * eps
        share, weights = assignment / total, (assignment + eps) / total
        if absent is not None:
            weights = weights.masked_fill(absent, 0)
    elif normalize == "sum":
        share = weights = assignment
    else:
        share = weights = assignment / (total + eps if normalize == "den" else total.clamp_min(eps))
    return _Weights(assignment, share, weights), mass


def _plain_forward(
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
    with autocast_off(q):
        keys = _normalized(k, norm_eps)
        values = keys if v is None else _normalized(v, norm_eps)
        (assignment, _, weights), mass = _plain_weights(q, keys, bias, mask, scale, normalize, eps)
        out = (_fold(weights, k.shape[1]) @ values).view(*q.shape[:3], values.shape[-1])
    return out.to(q.dtype), mass, assignment if return_map else assignment.new_empty(0)


def _layer_norm_backward(grad: Tensor, tokens: Tensor, norm_eps: float | None) -> Tensor:
    """Gradient of the raw tokens from that of the normalised ones, without affine part."""
    if norm_eps is None:
        return grad
    raw = tokens.to(grad.dtype)
    variance, mean = torch.var_mean(raw, dim=-1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + norm_eps)
    unit = (raw - mean) * rstd
    return rstd * (grad - grad.mean(-1, keepdim=True) - unit * (grad * unit).mean(-1, keepdim=True))


def _plain_backward(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_map: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mass: Tensor,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    token_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Recompute the map, then, per image and head,

    dW = dO V^T;  delta_t = sum_n W dW;  g = P (dW - delta) + A dA;  dS = g - A sum_t g;
    dV = W^T dO;  dK = scale dS^T q;  dq = scale dS K;  dbias = sum_n dS.

    dS is written through P = A / c, which is at most 1: dividing by c afterwards would blow up on a dead query.
    """
    groups = k.shape[1]
    with autocast_off(q):
        keys = _normalized(k, norm_eps)
        values = keys if v is None else _normalized(v, norm_eps)
        dtype = keys.dtype
        (assignment, share, weights), _ = _plain_weights(q, keys, bias, mask, scale, normalize, eps)
        grad_rows = _fold(grad_out.to(dtype), groups)
        grad_scores = (grad_rows @ values.transpose(-1, -2)).view_as(assignment)  # dW
        if normalize != "sum":
            delta = (weights * grad_scores).sum(-1, keepdim=True)
            if normalize == "l1max":
                delta = delta.masked_fill(mass[..., None] <= eps, 0)
            grad_scores = grad_scores - delta
        grad_scores = share * grad_scores
        if grad_mass is not None:
            grad_scores = grad_scores + assignment * grad_mass[..., None]
        if grad_map is not None:
            grad_scores = grad_scores + assignment * grad_map
        grad_scores = grad_scores - assignment * grad_scores.sum(-2, keepdim=True)
        grad_bias = mass.new_empty(0) if bias is None else grad_scores.sum(-1)
        rows = _fold(grad_scores * scale, groups)
        grad_q = (rows @ keys).view(q.shape)
        grad_k, grad_v = q.new_empty(0), q.new_empty(0)  # an op's outputs must not alias
        if token_grad:
            grad_keys = rows.transpose(-1, -2) @ _fold(q.to(dtype), groups)
            grad_values = _fold(weights, groups).transpose(-1, -2) @ grad_rows
            if v is None:
                grad_k = _layer_norm_backward(grad_keys + grad_values, k, norm_eps).to(k.dtype)
            else:
                grad_k = _layer_norm_backward(grad_keys, k, norm_eps).to(k.dtype)
                grad_v = _layer_norm_backward(grad_values, v, norm_eps).to(v.dtype)
    return grad_q.to(q.dtype), grad_k, grad_v, grad_bias


# ---------------------------------------------------------------------------------------------------------------------
# Triton forward: one pass over the tokens; a program holds one image's and head's outputs for a slice of the channels.


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
                # A chunk's mean and squares, joined to those so far (Chan et al. 1979): exact at any offset of the mean.
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


def _triton_forward(
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


# ---------------------------------------------------------------------------------------------------------------------
# Operators. Only these know which implementation runs; outputs: out (B,H,T,D), mass (B,H,T) and map (B,H,T,N) or (0,).


@torch.library.custom_op("eclip::slot_attention", mutates_args=())
def _core(
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
    forward = _triton_forward if launches_triton(q) else _plain_forward
    return forward(q, k, v, bias, mask, scale, normalize, eps, norm_eps, return_map)


@_core.register_fake
def _(
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
    values = k if v is None else v
    dtype = accumulate_dtype(q.dtype)
    map_shape = (*q.shape[:3], k.shape[2]) if return_map else (0,)
    return (
        q.new_empty(*q.shape[:3], values.shape[-1]),
        q.new_empty(q.shape[:3], dtype=dtype),
        q.new_empty(map_shape, dtype=dtype),
    )


@torch.library.custom_op("eclip::slot_attention_backward", mutates_args=())
def _core_backward(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_map: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mass: Tensor,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    token_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias; an empty tensor stands for one that does not exist or was not asked for."""
    return _plain_backward(
        grad_out, grad_mass, grad_map, q, k, v, bias, mask, mass, scale, normalize, eps, norm_eps, token_grad
    )


@_core_backward.register_fake
def _(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_map: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mass: Tensor,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    token_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty(k.shape if token_grad else (0,)),
        q.new_empty(v.shape if token_grad and v is not None else (0,)),
        mass.new_empty(bias.shape if bias is not None else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, mask, *options, return_map = inputs
    ctx.save_for_backward(q, k, v, bias, mask, output[1])
    ctx.options = options
    ctx.return_map = return_map
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_mass, grad_map):  # type: ignore[no-untyped-def]
    q, k, v, bias, mask, mass = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(q)
    if not ctx.return_map:
        grad_map = None
    token_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_q, grad_k, grad_v, grad_bias = _core_backward(
        grad_out, grad_mass, grad_map, q, k, v, bias, mask, mass, *ctx.options, token_grad
    )
    return (
        grad_q,
        grad_k if ctx.needs_input_grad[1] else None,
        grad_v if ctx.needs_input_grad[2] else None,
        grad_bias if ctx.needs_input_grad[3] else None,
        *(None,) * 6,
    )


_core.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------------------------
# Public functions.


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int = 1,
    normalize: Normalize = "den",
    eps: float = 1e-6,
    scale: float | None = None,
    query_bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_map: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let queries compete for tokens; return each query's weighted mean of the values.

    q: (B, T, D); k, v: (B, N, D); one floating dtype and device (under autocast: cast to its dtype). With `num_heads`
    > 1 the channels split into equal slices that compete separately. `scale` defaults to 1 / sqrt(D / num_heads).
    query_bias: (T,) or (B, T), finite, added to the scores after scaling. query_mask: (B, T) bool, True = present; an
    absent query takes part in nothing and its row is 0.
    Returns out (B, T, D) in q's dtype or, with `return_map`, (out, map): the softmax over queries A, not W, as
    (B, T, N), or (B, H, T, N) with several heads, in float32 (float64 for float64 inputs). Differentiable, once, in q,
    k, v and query_bias, through both outputs. Sums, softmax and eps are fp32 in every half-precision dtype.
    Raises ValueError when shapes, dtypes or devices disagree; on a GPU also for T > 64 or D / num_heads > 1024.
    """
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    dtype = autocast_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    _check_keys(q, k, v)
    _check_kernel_limits(q, q.shape[-1] // num_heads)
    queries, keys, values = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    bias = _core_bias(query_bias, q, num_heads)
    out, _, assignment = _core(
        queries, keys, values, bias, query_mask, _scale(scale, q, num_heads), normalize, float(eps), None, return_map
    )
    out = out.transpose(1, 2).flatten(2)
    return (out, _public_map(assignment)) if return_map else out


def slot_attention_absorbed(
    q: Tensor,
    tokens: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    *,
    num_heads: int = 1,
    token_norm: TokenNorm | None = None,
    normalize: Normalize = "den",
    eps: float = 1e-6,
    scale: float | None = None,
    query_bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_map: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`slot_attention(q, tokens @ w_key.T, tokens @ w_value.T)` without ever building the keys or the values.

    q: (B, T, D); tokens: (B, N, C), any batch and row stride; w_key, w_value: (D, C) as in `nn.Linear.weight`. A bias
    of the key projection is the `query_bias` scale * (q . bias); one of the value projection has no place here.
    token_norm: (gamma (C,), beta (C,), eps) folds a LayerNorm of the tokens in. Everything else as in `slot_attention`;
    gradients reach q, tokens, both weights, gamma, beta and query_bias.
    Cheaper than projecting while num_heads is small: T * num_heads < N by far (T=20, N=196: up to 4 heads).
    Source: the associativity of equations 1 and 3 of ECLIP (arXiv 2304.02853).
    """
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    dtype = autocast_dtype(q)
    q, tokens, w_key, w_value = (x.to(dtype) for x in (q, tokens, w_key, w_value))
    _check_tokens(q, tokens, w_key, w_value, token_norm)
    _check_kernel_limits(q, tokens.shape[-1])
    scale = _scale(scale, q, num_heads)
    bias = _core_bias(query_bias, q, num_heads)
    # (B, H, T, C): queries moved into token space, one set per head. The scale is applied inside, in fp32.
    queries = torch.einsum("bthd,hdc->bhtc", q.unflatten(-1, (num_heads, -1)), w_key.unflatten(0, (num_heads, -1)))
    norm_eps = None
    if token_norm is not None:
        gamma, beta, norm_eps = token_norm
        offset = scale * (queries @ beta.to(dtype)).to(accumulate_dtype(dtype))
        bias = offset if bias is None else bias + offset
        queries = queries * gamma.to(dtype)
    out, mass, assignment = _core(
        queries, tokens[:, None], None, bias, query_mask, scale, normalize, float(eps), norm_eps, return_map
    )
    values = w_value.unflatten(0, (num_heads, -1))
    if token_norm is not None:
        # sum_n W (unit gamma + beta) = out gamma + kappa beta, kappa = sum_n W.
        kappa = _weight_sum(mass, tokens.shape[1], query_mask, normalize, eps).to(dtype)
        out = out * gamma.to(dtype) + kappa[..., None] * beta.to(dtype)
    out = torch.einsum("bhtc,hdc->bthd", out, values).flatten(2)
    return (out, _public_map(assignment)) if return_map else out


def _weight_sum(mass: Tensor, num_tokens: int, mask: Tensor | None, normalize: str, eps: float) -> Tensor:
    """kappa (B, H, T): the sum of a query's weights W over the tokens."""
    if normalize == "mean":
        ones = torch.ones_like(mass)
        return ones if mask is None else ones * mask[:, None]
    if normalize == "den":
        return mass / (mass + eps)
    return mass / mass.clamp_min(eps) if normalize == "l1max" else mass


def _scale(scale: float | None, q: Tensor, num_heads: int) -> float:
    return 1.0 / math.sqrt(q.shape[-1] // num_heads) if scale is None else float(scale)


def _core_bias(query_bias: Tensor | None, q: Tensor, num_heads: int) -> Tensor | None:
    """(T,) or (B, T) -> (B, H, T) in the accumulation dtype, which half-precision scores are summed in."""
    if query_bias is None:
        return None
    batch, num_queries, _ = q.shape
    return query_bias.to(accumulate_dtype(q.dtype)).expand(batch, num_queries)[:, None].expand(-1, num_heads, -1)


def _public_map(assignment: Tensor) -> Tensor:
    return assignment[:, 0] if assignment.shape[1] == 1 else assignment


def _check_arguments(
    q: Tensor, num_heads: int, normalize: str, eps: float, query_bias: Tensor | None, query_mask: Tensor | None
) -> None:
    require(q.dim() == 3, f"q has shape {tuple(q.shape)}; (B, T, D) is needed")
    batch, num_queries, dim = q.shape
    require(num_queries > 0, "q holds no query; T must be at least 1")
    require(
        num_heads >= 1 and dim % num_heads == 0,
        f"num_heads={num_heads} does not divide the D={dim} channels of q; use a divisor of {dim}",
    )
    require(normalize in NORMALIZERS, f"normalize={normalize!r} is unknown; use one of {', '.join(NORMALIZERS)}")
    require(eps > 0, f"eps={eps} must be positive: a query that wins no token would be divided by zero")
    if query_bias is not None:
        require(
            tuple(query_bias.shape) in ((num_queries,), (batch, num_queries)),
            f"query_bias has shape {tuple(query_bias.shape)}; ({num_queries},) or ({batch}, {num_queries}) is needed",
        )
    if query_mask is not None:
        require(
            tuple(query_mask.shape) == (batch, num_queries) and query_mask.dtype == torch.bool,
            f"query_mask is {query_mask.dtype} of shape {tuple(query_mask.shape)}; "
            f"bool of shape ({batch}, {num_queries}) is needed, True = present",
        )


def _check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    require_alike(q=q, k=k, v=v)
    expected = (q.shape[0], k.shape[1] if k.dim() == 3 else "N", q.shape[2])
    for name, x in (("k", k), ("v", v)):
        require(tuple(x.shape) == expected, f"{name} has shape {tuple(x.shape)}; q and k ask for {expected}")
    require(k.shape[1] > 0, "k and v hold no token; N must be at least 1")


def _check_tokens(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, token_norm: TokenNorm | None) -> None:
    require_alike(q=q, tokens=tokens, w_key=w_key, w_value=w_value)
    require(
        tokens.dim() == 3 and tokens.shape[0] == q.shape[0] and tokens.shape[1] > 0,
        f"tokens have shape {tuple(tokens.shape)}; ({q.shape[0]}, N, C) with N at least 1 is needed",
    )
    expected = (q.shape[2], tokens.shape[2])
    for name, weight in (("w_key", w_key), ("w_value", w_value)):
        require(
            tuple(weight.shape) == expected,
            f"{name} has shape {tuple(weight.shape)}; q and tokens ask for {expected} (out, in), as nn.Linear.weight",
        )
    if token_norm is not None:
        for name, x in zip(("gamma", "beta"), token_norm, strict=False):
            require(
                isinstance(x, Tensor) and tuple(x.shape) == (tokens.shape[2],),
                f"token_norm's {name} must be a tensor of shape ({tokens.shape[2]},)",
            )


def _check_kernel_limits(q: Tensor, dim: int) -> None:
    if not q.is_cuda:
        return
    require(
        q.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"no GPU kernel for {q.dtype}; use slot_attention_reference or cast to float32",
    )
    require(
        q.shape[1] <= MAX_KERNEL_QUERIES and dim <= MAX_KERNEL_DIM,
        f"T={q.shape[1]}, channels={dim}: the GPU kernel holds at most T={MAX_KERNEL_QUERIES} queries of "
        f"{MAX_KERNEL_DIM} channels a head; use slot_attention_reference",
    )
