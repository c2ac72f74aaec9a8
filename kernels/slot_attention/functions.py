"""The public functions of slot attention, on every device.

`slot_attention` takes projected keys and values. `slot_attention_absorbed` takes the tokens and both weights and never
builds keys or values: scores = (q W_key) E^T and out = (W^T E) W_value^T, so that an N x D x D product becomes a
T x D x D one, and a block saves its T queries for backward instead of N keys and N values. Both run on one op (ops.py)
whose forward streams over the tokens: the T x N map reaches device memory only if it is asked for. `share_tokens` lets
several blocks on the same tokens write one gradient of them instead of one each (ports.py).
"""

import torch
from torch import Tensor

from ..launch import accumulate_dtype, autocast_dtype, require
from .ops import core
from .options import supported
from .ports import TokenPort, core_into_port, share
from .reference import (
    Normalize,
    TokenNorm,
    as_asked,
    check_arguments,
    check_keys,
    check_tokens,
    scale_or_default,
)


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
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Let queries compete for tokens; return each query's weighted mean of the values.

    q: (B, T, D); k, v: (B, N, D); one floating dtype and device (under autocast: cast to its dtype). With `num_heads`
    > 1 the channels split into equal slices that compete separately. `scale` defaults to 1 / sqrt(D / num_heads).
    query_bias: (T,) or (B, T), finite, added to the scores after scaling. query_mask: (B, T) bool, True = present; an
    absent query takes part in nothing and its row is 0.
    Returns out (B, T, D) in q's dtype, or a tuple of it and what was asked for, in this order and in float32 (float64
    for float64 inputs): with `return_map` the softmax over queries A, not W, as (B, T, N), or (B, H, T, N) with several
    heads; with `return_entropy` the sum over tokens of -sum_t A ln A, as (B, H), in nats, for which no map is written.
    Differentiable, once, in q, k, v and query_bias, through all of them. Sums, softmax and eps are fp32 in every
    half-precision dtype.
    Raises ValueError when shapes, dtypes or devices disagree; on a GPU also for T > 64 or D / num_heads > 2048.
    """
    check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    check_keys(q, k, v)
    _check_supported(q, q.shape[-1] // num_heads)
    queries, keys, values = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    bias = _core_bias(query_bias, q, num_heads)
    options = (scale_or_default(scale, q, num_heads), normalize, float(eps), None, return_map, return_entropy)
    out, _, assignment, entropy = core(queries, keys, values, bias, query_mask, *options)
    out = out.transpose(1, 2).flatten(2)
    return as_asked(out, assignment if return_map else None, entropy if return_entropy else None)


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
    return_entropy: bool = False,
    port: TokenPort | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`slot_attention(q, tokens @ w_key.T, tokens @ w_value.T)` without ever building the keys or the values.

    q: (B, T, D); tokens: (B, N, C), any batch and row stride; w_key, w_value: (D, C) as in `nn.Linear.weight`. A bias
    of the key projection is the `query_bias` scale * (q . bias); one of the value projection has no place here.
    token_norm: (gamma (C,), beta (C,), eps) folds a LayerNorm of the tokens in. port: one of `share_tokens`, for tokens
    that several calls read. Everything else as in `slot_attention`; gradients reach q, tokens, both weights, gamma,
    beta and query_bias.
    Cheaper than projecting while num_heads is small: T * num_heads < N by far (T=20, N=196: up to 4 heads).
    Source: the associativity of equations 1 and 3 of ECLIP (arXiv 2304.02853).
    """
    check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, tokens, w_key, w_value = (x.to(autocast_dtype(x)) for x in (q, tokens, w_key, w_value))
    dtype = q.dtype
    check_tokens(q, tokens, w_key, w_value, token_norm)
    _check_supported(q, tokens.shape[-1])
    if port is not None:
        _check_port(q, tokens, num_heads, port)
    scale = scale_or_default(scale, q, num_heads)
    bias = _core_bias(query_bias, q, num_heads)
    # (B, H, T, C): queries moved into token space, one set per head. The scale is applied inside, in fp32.
    queries = torch.einsum("bthd,hdc->bhtc", q.unflatten(-1, (num_heads, -1)), w_key.unflatten(0, (num_heads, -1)))
    norm_eps = None
    if token_norm is not None:
        gamma, beta, norm_eps = token_norm
        offset = scale * (queries @ beta.to(dtype)).to(accumulate_dtype(dtype))
        bias = offset if bias is None else bias + offset
        queries = queries * gamma.to(dtype)
    options = (scale, normalize, float(eps), norm_eps, return_map, return_entropy)
    if port is None:
        out, mass, assignment, entropy = core(queries, tokens[:, None], None, bias, query_mask, *options)
    else:
        out, mass, assignment, entropy = core_into_port(queries, tokens[:, None], bias, query_mask, *options, port)
    values = w_value.unflatten(0, (num_heads, -1))
    if token_norm is not None:
        # sum_n W (unit gamma + beta) = out gamma + kappa beta, kappa = sum_n W.
        kappa = _weight_sum(mass, tokens.shape[1], query_mask, normalize, eps).to(dtype)
        out = out * gamma.to(dtype) + kappa[..., None] * beta.to(dtype)
    out = torch.einsum("bhtc,hdc->bthd", out, values).flatten(2)
    return as_asked(out, assignment if return_map else None, entropy if return_entropy else None)


def share_tokens(tokens: Tensor, uses: int, *, num_queries: int, num_heads: int = 1) -> tuple[Tensor, list[TokenPort]]:
    """Prepare tokens (B, N, C) for `uses` calls of `slot_attention_absorbed`, whose gradient of them is written once.

    Returns the tokens, cut off from the graph (under autocast: cast once, to its dtype), and a `port` for each call:

        tokens, ports = share_tokens(tokens, len(blocks), num_queries=20)
        for block, port in zip(blocks, ports):
            slots = slot_attention_absorbed(..., tokens, ..., port=port)

    The gradient of what was passed in comes back through the ports that were used, each by one call: a second one
    raises ValueError, or has a wrong gradient where that cannot be seen (compiled, FSDP2). num_queries, num_heads:
    those of the calls. Works under activation checkpointing (use_reentrant=False), FSDP2 and torch.compile. With FSDP2,
    pass `MixedPrecisionPolicy(cast_forward_inputs=False)`: its default casts what enters a block, the ports too where
    dtypes differ, and gives each the memory that it does without: 2 x (B, H, T, C) and (B, H, N, 64) a block at T = 20.
    Raises ValueError when tokens are not (B, N, C) or a count is not positive.
    """
    require(tokens.dim() == 3, f"tokens have shape {tuple(tokens.shape)}; (B, N, C) is needed")
    require(
        min(uses, num_queries, num_heads) >= 1,
        lambda: f"uses={uses}, num_queries={num_queries}, num_heads={num_heads}: each must be at least 1",
    )
    tokens = tokens.to(autocast_dtype(tokens))
    return tokens.detach(), share(tokens, uses, num_queries, num_heads)


def _weight_sum(mass: Tensor, num_tokens: int, mask: Tensor | None, normalize: str, eps: float) -> Tensor:
    """kappa (B, H, T): the sum of a query's weights W over the tokens."""
    if normalize == "mean":
        ones = torch.ones_like(mass)
        return ones if mask is None else ones * mask[:, None]
    if normalize == "den":
        return mass / (mass + eps)
    return mass / mass.clamp_min(eps) if normalize == "l1max" else mass


def _core_bias(query_bias: Tensor | None, q: Tensor, num_heads: int) -> Tensor | None:
    """(T,) or (B, T) -> (B, H, T) in the accumulation dtype, which half-precision scores are summed in."""
    if query_bias is None:
        return None
    batch, num_queries, _ = q.shape
    return query_bias.to(accumulate_dtype(q.dtype)).expand(batch, num_queries)[:, None].expand(-1, num_heads, -1)


def _check_port(q: Tensor, tokens: Tensor, num_heads: int, port: TokenPort) -> None:
    require(
        not tokens.requires_grad,
        "tokens want a gradient of their own beside the one that goes to `port`; pass those that share_tokens returned",
    )
    expected = (q.shape[0], num_heads, q.shape[1], tokens.shape[2])
    require(
        tuple(port.queries.shape) == expected and port.queries.dtype == q.dtype,
        f"port is for {port.queries.dtype} queries of shape {tuple(port.queries.shape)} (B, H, T, C) and this call has "
        f"{q.dtype} of {expected}; give share_tokens the same tokens, num_queries and num_heads",
    )


def _check_supported(q: Tensor, dim: int) -> None:
    """On a GPU there is no other path than the kernels."""
    reason = supported(q.dtype, q.shape[1], dim) if q.is_cuda else None
    if reason is not None:
        raise ValueError(reason)
