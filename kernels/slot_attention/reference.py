"""The specification of slot attention: what its arguments must be, and its result in plain PyTorch of any size.

fp32 inside, as in the kernels; float64 stays float64. The letters stand in __init__.py.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import accumulate_dtype, autocast_dtype, autocast_off, require, require_alike

Normalize = Literal["mean", "den", "l1max", "sum"]
NORMALIZERS = ("mean", "den", "l1max", "sum")
TokenNorm = tuple[Tensor, Tensor, float]  # gamma (C,), beta (C,), eps


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
    check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    check_keys(q, k, v)
    dtype = accumulate_dtype(q.dtype)
    with autocast_off(q):
        queries, keys, values = (x.to(dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = scale_or_default(scale, q, num_heads) * queries @ keys.transpose(-1, -2)  # (B, H, T, N)
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
    return as_asked(out, assignment if return_map else None, entropy)


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
    check_arguments(q, num_heads, normalize, eps, query_bias, query_mask)
    q, tokens, w_key, w_value = (x.to(autocast_dtype(x)) for x in (q, tokens, w_key, w_value))
    check_tokens(q, tokens, w_key, w_value, token_norm)
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


def _entropy(assignment: Tensor) -> Tensor:
    """-sum A ln A over queries and tokens: (B, H, T, N) to (B, H)."""
    # Clamped inside the logarithm alone: at A = 0, where softmax underflows, the derivative -ln A - 1 is infinite.
    logarithm = assignment.clamp_min(torch.finfo(assignment.dtype).tiny).log()
    return -(assignment * logarithm).sum((-1, -2))


# --- What the public functions share with it --------------------------------------------------------------------------


def scale_or_default(scale: float | None, q: Tensor, num_heads: int) -> float:
    """1 / sqrt(D / H) where the caller gave none."""
    return 1.0 / math.sqrt(q.shape[-1] // num_heads) if scale is None else float(scale)


def as_asked(out: Tensor, assignment: Tensor | None, entropy: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """What the caller asked for, in the order that `slot_attention` promises."""
    extras = []
    if assignment is not None:
        extras.append(assignment[:, 0] if assignment.shape[1] == 1 else assignment)
    if entropy is not None:
        extras.append(entropy)
    return (out, *extras) if extras else out


def check_arguments(
    q: Tensor, num_heads: int, normalize: str, eps: float, query_bias: Tensor | None, query_mask: Tensor | None
) -> None:
    """Raise ValueError for what both forms ask of q and of what comes beside the tokens."""
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


def check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless k and v are (B, N, D) like q, in its dtype and on its device."""
    require_alike(q=q, k=k, v=v)
    expected = (q.shape[0], k.shape[1] if k.dim() == 3 else "N", q.shape[2])
    for name, x in (("k", k), ("v", v)):
        require(tuple(x.shape) == expected, f"{name} has shape {tuple(x.shape)}; q and k ask for {expected}")
    require(k.shape[1] > 0, "k and v hold no token; N must be at least 1")


def check_tokens(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, token_norm: TokenNorm | None) -> None:
    """Raise ValueError unless tokens are (B, N, C), weights (D, C), in q's dtype and device, gamma and beta (C,)."""
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
