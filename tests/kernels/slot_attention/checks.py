"""What the tests of slot attention share: inputs, a plain formulation, and the comparison with float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_as_accurate

EPS = 1e-6


def randn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def kv_inputs(batch: int, queries: int, tokens: int, dim: int, seed: int = 0) -> list[Tensor]:
    """q, k, v."""
    return randn((batch, queries, dim), (batch, tokens, dim), (batch, tokens, dim), seed=seed)


def absorbed_inputs(batch: int, queries: int, tokens: int, dim: int, channels: int, seed: int = 0) -> list[Tensor]:
    """q, tokens, w_key, w_value, then gamma and beta of the LayerNorm."""
    weight, vector = (dim, channels), (channels,)
    shapes = (batch, queries, dim), (batch, tokens, channels), weight, weight, vector, vector
    q, x, w_key, w_value, gamma, beta = randn(*shapes, seed=seed)
    return [q, x, w_key / math.sqrt(channels), w_value / math.sqrt(channels), 1 + 0.2 * gamma, 0.2 * beta]


def eager(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int = 1, normalize: str = "den", **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What one writes in PyTorch without care for precision: matmuls in the inputs' dtype, softmax in float32."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    assignment = (q @ k.mT / math.sqrt(q.shape[-1])).to(torch.promote_types(q.dtype, torch.float32)).softmax(-2)
    mass = assignment.sum(-1, keepdim=True)
    weights = {
        "mean": lambda: (assignment + EPS) / (mass + k.shape[2] * EPS),
        "den": lambda: assignment / (mass + EPS),
        "l1max": lambda: assignment / mass.clamp_min(EPS),
        "sum": lambda: assignment,
    }[normalize]()
    out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    entropy = -(assignment * assignment.clamp_min(1e-38).log()).sum((-1, -2))
    return out, assignment[:, 0] if num_heads == 1 else assignment, entropy


def eager_absorbed(
    q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if norm:
        x = F.layer_norm(x, x.shape[-1:], *norm)
    return eager(q, x @ w_key.mT, x @ w_value.mT, **options)


def ours_absorbed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op with gamma and beta as last positional arguments, so that they are differentiated like the others."""

    def call(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **options: Any) -> Any:
        token_norm = (*norm, 1e-5) if norm else None
        return function(q, x, w_key, w_value, token_norm=token_norm, **options)

    return call


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, map, entropy and the gradient of every input, for fixed random gradients of all three."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, return_map=True, return_entropy=True, **options)
    seeds = [g.to(x) for g, x in zip(randn(*(tuple(x.shape) for x in outputs), seed=7), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, seeds)
    found = dict(zip(("out", "map", "entropy"), outputs, strict=True))
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


def check(
    path: torch.device,
    function: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """On `path` and in `dtype`, outputs and gradients miss float64 by at most twice what `plain` misses it by."""
    rounded = [x.to(dtype) for x in inputs]
    exact = outputs_and_gradients(plain, [x.double() for x in rounded], **options)
    low = outputs_and_gradients(plain, rounded, **options)
    ours = outputs_and_gradients(function, [x.to(path) for x in rounded], **options)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        # An entropy is one number an image, in which the rounding of thousands of scores may cancel by luck.
        floor = max(1e-5, torch.finfo(dtype).eps / 8) if name == "entropy" else 1e-5
        assert_as_accurate(value, low[name], exact[name], floor=floor, name=name)
