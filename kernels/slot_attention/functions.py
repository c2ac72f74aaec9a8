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
`share_tokens` lets several blocks on the same tokens write one gradient of them instead of one each.

Letters: B images, N tokens, T queries, D channels, H heads, G groups (1: all heads read the same tokens; H: a slice
each).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import KERNEL_DTYPES, accumulate_dtype, autocast_dtype, autocast_off, require, require_alike
from .ops import core
from .ports import TokenPort, core_into_port, share

Normalize = Literal["mean", "den", "l1max", "sum"]
NORMALIZERS = ("mean", "den", "l1max", "sum")
TokenNorm = tuple[Tensor, Tensor, float]
MAX_KERNEL_QUERIES = 64
MAX_KERNEL_DIM = 2048


# --- Reference: the specification, in plain PyTorch; fp32 inside, float64 stays float64 -------------------------------


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
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`slot_attention` in plain PyTorch operations; same arguments, shapes and errors, any size."""
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
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
        entropy = _entropy(assignment) if return_entropy else None
    return _outputs(out, assignment if return_map else None, entropy)


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
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`slot_attention_absorbed` the long way round: LayerNorm, both projections, then `slot_attention_reference`."""
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, tokens, w_key, w_value = (x.to(autocast_dtype(x)) for x in (q, tokens, w_key, w_value))
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
            return_entropy=return_entropy,
        )
    if isinstance(result, tuple):
        return result[0].to(q.dtype), *result[1:]
    return result.to(q.dtype)


# --- Public functions -------------------------------------------------------------------------------------------------


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
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    _check_keys(q, k, v)
    _check_kernel_limits(q, q.shape[-1] // num_heads)
    queries, keys, values = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    bias = _core_bias(query_bias, q, num_heads)
    options = (_scale(scale, q, num_heads), normalize, float(eps), None, return_map, return_entropy)
    out, _, assignment, entropy = core(queries, keys, values, bias, query_mask, *options)
    out = out.transpose(1, 2).flatten(2)
    return _outputs(out, assignment if return_map else None, entropy if return_entropy else None)


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
    _check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, tokens, w_key, w_value = (x.to(autocast_dtype(x)) for x in (q, tokens, w_key, w_value))
    dtype = q.dtype
    _check_tokens(q, tokens, w_key, w_value, token_norm)
    _check_kernel_limits(q, tokens.shape[-1])
    if port is not None:
        _check_port(q, tokens, num_heads, port)
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
    return _outputs(out, assignment if return_map else None, entropy if return_entropy else None)


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


def _scale(scale: float | None, q: Tensor, num_heads: int) -> float:
    return 1.0 / math.sqrt(q.shape[-1] // num_heads) if scale is None else float(scale)


def _core_bias(query_bias: Tensor | None, q: Tensor, num_heads: int) -> Tensor | None:
    """(T,) or (B, T) -> (B, H, T) in the accumulation dtype, which half-precision scores are summed in."""
    if query_bias is None:
        return None
    batch, num_queries, _ = q.shape
    return query_bias.to(accumulate_dtype(q.dtype)).expand(batch, num_queries)[:, None].expand(-1, num_heads, -1)


def _entropy(assignment: Tensor) -> Tensor:
    # Clamped inside the logarithm alone: at A = 0, where softmax underflows, the derivative -ln A - 1 is infinite.
    logarithm = assignment.clamp_min(torch.finfo(assignment.dtype).tiny).log()
    return -(assignment * logarithm).sum((-1, -2))


def _outputs(out: Tensor, assignment: Tensor | None, entropy: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """What the caller asked for, in the order that `slot_attention` promises."""
    extras = []
    if assignment is not None:
        extras.append(assignment[:, 0] if assignment.shape[1] == 1 else assignment)
    if entropy is not None:
        extras.append(entropy)
    return (out, *extras) if extras else out


def _check_arguments(
    q: Tensor, num_heads: int, normalize: str, eps: float, query_bias: Tensor | None, query_mask: Tensor | None
) -> None:
    require(q.dim() == 3, f"q has shape {tuple(q.shape)}; (B, T, D) is needed")
    batch, num_queries, dim = q.shape
    require(num_queries > 0, "q holds no query; T must be at least 1")
    require(
        num_heads >= 1 and dim % num_heads == 0,
        lambda: f"num_heads={num_heads} does not divide the D={dim} channels of q; use a divisor of {dim}",
    )
    require(normalize in NORMALIZERS, f"normalize={normalize!r} is unknown; use one of {', '.join(NORMALIZERS)}")
    require(eps > 0, lambda: f"eps={eps} must be positive: a query that wins no token would be divided by zero")
    if query_bias is not None:
        # Compared one by one: torch.compile(dynamic=True) takes symbols for different in `shape in shapes`.
        shape = tuple(query_bias.shape)
        require(
            shape == (num_queries,) or shape == (batch, num_queries),
            f"query_bias has shape {shape}; ({num_queries},) or ({batch}, {num_queries}) is needed",
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
        norm_eps = token_norm[2]
        require(norm_eps >= 0, lambda: f"token_norm's eps={norm_eps} must be 0 or more: a variance is added to it")


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


def _check_kernel_limits(q: Tensor, dim: int) -> None:
    if not q.is_cuda:
        return
    require(
        q.dtype in KERNEL_DTYPES,
        f"no GPU kernel for {q.dtype}; use slot_attention_reference or cast to float32",
    )
    require(
        q.shape[1] <= MAX_KERNEL_QUERIES and dim <= MAX_KERNEL_DIM,
        f"T={q.shape[1]}, channels={dim}: the GPU kernel holds at most T={MAX_KERNEL_QUERIES} queries of "
        f"{MAX_KERNEL_DIM} channels a head; use slot_attention_reference",
    )
