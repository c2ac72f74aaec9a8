"""The op under both forms of slot attention: its PyTorch implementation, its gradients, its registration.

    out, mass, map = core(q (B, H, T, D), k (B, G, N, D), v (B, G, N, D) or None, bias (B, H, T), mask (B, T), ...)

v = None: the values are the keys (the absorbed form, where both are the raw tokens). norm_eps: the tokens pass through
a LayerNorm without affine part first. out is (B, H, T, D); mass (B, H, T) is s, each query's sum of A; map is A,
(B, H, T, N), or empty when not asked for. The gradients reach q, k, v and bias through all three outputs, so that
whatever is built on them (sum_n W from the mass, an entropy of the map) needs no code here. slot_attention.py explains
the letters.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import accumulate_dtype, autocast_off, launches_triton
from .slot_attention_kernels import triton_forward

# --- PyTorch implementation -------------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """What the plain backward recomputes, all (B, H, T, N) or broadcasting to it, in the accumulation dtype."""

    assignment: Tensor
    share: Tensor  # P = A / c
    weights: Tensor  # W


def _fold(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, X) -> (B, G, H/G * T, X): heads of a group become rows of one matmul, not copies of its tokens."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, groups, heads // groups * rows, width)


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


# --- Operators: only these know which implementation runs -------------------------------------------------------------


@torch.library.custom_op("eclip::slot_attention", mutates_args=())
def core(
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
    forward = triton_forward if launches_triton(q) else _plain_forward
    return forward(q, k, v, bias, mask, scale, normalize, eps, norm_eps, return_map)


@core.register_fake
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
def core_backward(
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


@core_backward.register_fake
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


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bias, mask, *options, return_map = inputs
    ctx.save_for_backward(q, k, v, bias, mask, output[1])
    ctx.options = options
    ctx.return_map = return_map
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_mass, grad_map):
    q, k, v, bias, mask, mass = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(q)
    if not ctx.return_map:
        grad_map = None
    token_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_q, grad_k, grad_v, grad_bias = core_backward(
        grad_out, grad_mass, grad_map, q, k, v, bias, mask, mass, *ctx.options, token_grad
    )
    return (
        grad_q,
        grad_k if ctx.needs_input_grad[1] else None,
        grad_v if ctx.needs_input_grad[2] else None,
        grad_bias if ctx.needs_input_grad[3] else None,
        *(None,) * 6,
    )


core.register_autograd(_backward, setup_context=_setup_context)
