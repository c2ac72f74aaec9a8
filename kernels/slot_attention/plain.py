"""The PyTorch implementation of the slot attention ops: what CPU tensors take, in fp32 (float64 for float64).

Same contract as the Triton kernels, which ops.py states; __init__.py explains the letters.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import accumulate_dtype, autocast_off
from .options import padded_queries


def plain_forward(
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
    with autocast_off(q):
        keys, _, _ = _normalized(k, norm_eps)
        values = keys if v is None else v.to(keys.dtype)
        assignment, _, weights, mass = _assign(q, keys, bias, mask, scale, normalize, eps)
        out = (_fold(weights, k.shape[1]) @ values).view(*q.shape[:3], values.shape[-1])
        none = assignment.new_empty(0)
        entropy = torch.special.entr(assignment).sum((-1, -2)) if return_entropy else none
    return out.to(q.dtype), mass, assignment if return_map else none.clone(), entropy


def plain_backward(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_map: Tensor | None,
    grad_entropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mass: Tensor,
    out: Tensor,
    scale: float,
    normalize: str,
    eps: float,
    norm_eps: float | None,
    token_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Recompute the map, then, per image and head,

    dW = dO V^T;  delta_t = sum_n W dW;  g = P (dW - delta) + A (ds + dA - dh ln A);  dS = g - A sum_t g;
    dq = scale dS K;  dbias = sum_n dS;  the tokens' gradient stays in the factors dS and W.

    dS is written through P = A / c, which is at most 1: dividing by c afterwards would blow up on a dead query.
    """
    groups = k.shape[1]
    with autocast_off(q):
        keys, mean, rstd = _normalized(k, norm_eps)
        dtype = keys.dtype
        values = keys if v is None else v.to(dtype)
        assignment, share, weights, _ = _assign(q, keys, bias, mask, scale, normalize, eps)
        grad_weights = (_fold(grad_out.to(dtype), groups) @ values.transpose(-1, -2)).view_as(assignment)  # dW
        inner = grad_weights
        if normalize != "sum":
            delta = (weights * grad_weights).sum(-1, keepdim=True)
            if normalize == "l1max":
                delta = delta.masked_fill(mass[..., None] <= eps, 0)
            inner = grad_weights - delta
        grad_scores = share * inner
        if grad_mass is not None:
            grad_scores = grad_scores + assignment * grad_mass[..., None]
        if grad_map is not None:
            grad_scores = grad_scores + assignment * grad_map
        if grad_entropy is not None:
            # d entr(A) / dA is -ln A - 1; the 1 falls out of dS, which is what remains after the mean over queries.
            grad_scores = grad_scores + torch.special.entr(assignment) * grad_entropy[..., None, None]
        grad_scores = grad_scores - assignment * grad_scores.sum(-2, keepdim=True)
        grad_bias = mass.new_empty(0) if bias is None else grad_scores.sum(-1)
        rows = grad_scores * scale
        grad_q = (_fold(rows, groups) @ keys).view(q.shape).to(q.dtype)
        coefficients, affine = q.new_empty(0), mass.new_empty(0)
        if token_grad:
            coefficients = _coefficients(rows, weights, rstd)
            if mean is not None and rstd is not None:
                raw_scores = (_fold(q.to(dtype), groups) @ keys.transpose(-1, -2)).view_as(assignment)
                affine = _affine(coefficients, q, grad_out, raw_scores, grad_weights, mean, rstd)
            coefficients = coefficients.to(q.dtype)
    return grad_q, grad_bias, coefficients, affine


def plain_token_gradients(
    coefficients: list[Tensor],
    queries: list[Tensor],
    grad_outs: list[Tensor],
    affines: list[Tensor],
    tokens: Tensor,
    which: str,
) -> Tensor:
    groups = tokens.shape[1]
    dtype = accumulate_dtype(tokens.dtype)
    num_queries, padded = queries[0].shape[2], coefficients[0].shape[-1] // 2
    left, right = [], []
    with autocast_off(tokens):
        for both, q, grad_out in zip(coefficients, queries, grad_outs, strict=True):
            halves = both.to(dtype).split(padded, -1)
            for name, half, rows in zip(("queries", "grad_outs"), halves, (q, grad_out), strict=True):
                if which in ("both", name):
                    left.append(_fold(half[..., :num_queries].transpose(-1, -2), groups))
                    right.append(_fold(rows.to(dtype), groups))
        grad = torch.cat(left, -2).transpose(-1, -2) @ torch.cat(right, -2)
        for affine in affines:
            offset, slope = affine.unflatten(1, (groups, -1)).sum(2).split(1, -1)
            grad = grad + offset + slope * tokens.to(dtype)
    return grad.to(tokens.dtype).contiguous()


class _Assignment(NamedTuple):
    """All (B, H, T, N) or broadcasting to it, in the accumulation dtype; mass (B, H, T)."""

    assignment: Tensor
    share: Tensor  # P = A / c
    weights: Tensor  # W
    mass: Tensor


def _assign(
    q: Tensor, keys: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, normalize: str, eps: float
) -> _Assignment:
    """The softmax over queries and its normalised forms, from queries and (already normalised) keys."""
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
    return _Assignment(assignment, share, weights, mass)


def _coefficients(rows: Tensor, weights: Tensor, rstd: Tensor | None) -> Tensor:
    """scale dS and W, (B, H, T, N) each, times the tokens' 1/std, to (B, H, N, 2 TP): zero beyond T."""
    num_queries = rows.shape[2]
    padding = (0, padded_queries(num_queries) - num_queries)
    both = torch.cat([F.pad(x.expand_as(rows).transpose(-1, -2), padding) for x in (rows, weights)], dim=-1)
    return both if rstd is None else _per_head(rstd, rows.shape[1]) * both


def _affine(
    coefficients: Tensor,
    q: Tensor,
    grad_out: Tensor,
    raw_scores: Tensor,
    grad_weights: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor:
    """What LayerNorm's mean and variance take from the tokens' gradient: (B, H, N, 2), offset and slope in a token."""
    num_queries, padded, dim = q.shape[2], coefficients.shape[-1] // 2, q.shape[-1]
    rounded = coefficients.to(q.dtype).to(mean.dtype)
    first, second = (half[..., :num_queries].transpose(-1, -2) for half in rounded.split(padded, -1))
    u, v = (x.to(mean.dtype).sum(-1)[..., None] for x in (q, grad_out))
    average = (first * u + second * v).sum(2) / dim  # of the gradient over channels
    along = (first * raw_scores + second * grad_weights).sum(2) / dim  # of its product with the normalised token
    mean, rstd = (_per_head(x, q.shape[1])[..., 0] for x in (mean, rstd))
    slope = -rstd * along
    return torch.stack([-average - slope * mean, slope], -1)


def _fold(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, X) -> (B, G, H/G * T, X): heads of a group become rows of one matmul, not copies of its tokens."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, groups, heads // groups * rows, width)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(B, G, N, 1) to (B, H, N, 1)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _normalized(tokens: Tensor, norm_eps: float | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens in the accumulation dtype, after LayerNorm without affine part if norm_eps is given; mean, 1/std."""
    tokens = tokens.to(accumulate_dtype(tokens.dtype))
    if norm_eps is None:
        return tokens, None, None
    mean = tokens.mean(-1, keepdim=True)
    centred = tokens - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm_eps)
    return centred * rstd, mean, rstd
