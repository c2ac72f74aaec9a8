"""Slot attention of one decoder block, projections of the tokens included: the scores, the softmax, the weighted means.

Providers: `eager` writes the layer as one would, matmuls in the input dtype and the softmax in float32; `compile` is
torch.compile of that; `einsum` is the absorbed algebra in plain PyTorch; `projected` projects the tokens and calls
`slot_attention`; `ours` is `slot_attention_absorbed`. eager to einsum is the gain of the algebra, einsum to ours that
of the kernel. Counted bytes: the tokens, read once forward, read and their gradient written once backward; everything
else is T / N of that. FLOPs: the absorbed form's, two products with the tokens forward and five more backward. error:
largest miss of the first images' outputs against float64, relative to the largest output.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.kernels.slot_attention import slot_attention, slot_attention_absorbed, slot_attention_absorbed_reference

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
EPS = 1e-6
# Name: (B, N, T, D, heads) on a GPU, and on a CPU.
SHAPES = {
    "small batch": ((256, 196, 20, 768, 1), (8, 49, 20, 64, 1)),
    "large batch": ((4096, 196, 20, 768, 1), (16, 49, 20, 64, 1)),
    "4 heads": ((1024, 196, 20, 768, 4), (8, 49, 20, 64, 4)),
    "12 heads": ((1024, 196, 20, 768, 12), (8, 49, 20, 48, 12)),
    "64 queries": ((1024, 196, 64, 768, 1), (8, 49, 64, 64, 1)),
}


def eager(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, *, num_heads: int) -> Tensor:
    k, v = tokens @ w_key.T, tokens @ w_value.T
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    assignment = (q @ k.mT / math.sqrt(q.shape[-1])).float().softmax(-2)
    weights = assignment / (assignment.sum(-1, keepdim=True) + EPS)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def einsum(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, *, num_heads: int) -> Tensor:
    batch, queries, dim = q.shape
    scale = 1 / math.sqrt(dim // num_heads)
    w_key, w_value = (w.unflatten(0, (num_heads, -1)) for w in (w_key, w_value))
    moved = torch.einsum("bthd,hdc->bhtc", q.unflatten(-1, (num_heads, -1)) * scale, w_key)
    scores = (moved.flatten(1, 2) @ tokens.mT).view(batch, num_heads, queries, -1)
    assignment = scores.float().softmax(-2)
    weights = assignment / (assignment.sum(-1, keepdim=True) + EPS)
    out = (weights.to(tokens.dtype).flatten(1, 2) @ tokens).view(batch, num_heads, queries, -1)
    return torch.einsum("bhtc,hdc->bthd", out, w_value).flatten(2)


def projected(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor, *, num_heads: int) -> Tensor:
    out = slot_attention(q, tokens @ w_key.T, tokens @ w_value.T, num_heads=num_heads)
    assert isinstance(out, Tensor)
    return out


PROVIDERS: dict[str, Callable[..., Any]] = {
    "eager": eager,
    "compile": eager,
    "einsum": einsum,
    "projected": projected,
    "ours": slot_attention_absorbed,
}


def pick(bench: Any, shape: str, provider: str) -> tuple[Layer, tuple[Tensor, ...], dict[str, Any]]:
    """The layer, its inputs (q, tokens, w_key, w_value) and the columns of the record that depend on the shape."""
    batch, num_tokens, queries, dim, heads = bench.pick(gpu=SHAPES[shape][0], cpu=SHAPES[shape][1])
    if provider == "compile" and not bench.gpu:
        pytest.skip("torch.compile is timed on GPUs only: on a CPU its first call takes 12 s and nothing is learned")
    inputs = (
        bench.randn(batch, queries, dim),
        bench.randn(batch, num_tokens, dim),
        bench.randn(dim, dim, seed=1) / math.sqrt(dim),
        bench.randn(dim, dim, seed=2) / math.sqrt(dim),
    )
    function = PROVIDERS[provider]
    if provider == "compile":
        torch._dynamo.reset()  # else a new shape compiles a dynamic-shape kernel, slower than the one it stands for
        function = torch.compile(function, dynamic=False)

    def layer(q: Tensor, tokens: Tensor, w_key: Tensor, w_value: Tensor) -> Tensor:
        out: Tensor = function(q, tokens, w_key, w_value, num_heads=heads)
        return out

    few = min(batch, 8)
    exact = slot_attention_absorbed_reference(
        inputs[0][:few].double(), inputs[1][:few].double(), *(w.double() for w in inputs[2:]), num_heads=heads
    )
    assert isinstance(exact, Tensor)
    with torch.no_grad():
        miss = PROVIDERS[provider](inputs[0][:few], inputs[1][:few], *inputs[2:], num_heads=heads) - exact
    columns = {
        "provider": provider,
        "shape": f"B={batch} N={num_tokens} T={queries} D={dim} h={heads}",
        "bytes": inputs[1].nbytes,
        "flops": 4 * batch * heads * queries * num_tokens * dim + 4 * batch * queries * dim * dim,
        "error": float(miss.abs().max() / exact.abs().max()),
    }
    return layer, inputs, columns


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(bench: Any, shape: str, provider: str) -> None:
    layer, inputs, columns = pick(bench, shape, provider)
    with torch.no_grad():
        bench(lambda: layer(*inputs), op="slot_attention forward", **columns)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward(bench: Any, shape: str, provider: str) -> None:
    layer, inputs, columns = pick(bench, shape, provider)
    batch, queries, dim = inputs[0].shape
    projections = 4 * batch * queries * dim * dim
    columns["flops"] = 7 * (columns["flops"] - projections) // 2 + 3 * projections
    columns["bytes"] *= 3
    bench(bench.backward(layer, *inputs), op="slot_attention forward+backward", **columns)
