"""The specification of slot attention: the paper's equations a number at a time, its gradients, and what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.kernels.slot_attention import (
    NORMALIZERS,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_absorbed_reference,
    slot_attention_reference,
)
from tests.kernels.slot_attention.checks import (
    EPS,
    absorbed_inputs,
    kv_inputs,
    ours_absorbed,
    outputs_and_gradients,
    randn,
)


def equations(q: Tensor, k: Tensor, v: Tensor, heads: int, normalize: str, eps: float) -> tuple[Tensor, Tensor]:
    """Equations 1-4 of the paper, a number at a time. Returns out (B, T, D) and A (B, H, T, N)."""
    batch, num_queries, dim = q.shape
    num_tokens, width = k.shape[1], dim // heads
    root = math.sqrt(width)
    out = torch.zeros(batch, num_queries, dim, dtype=torch.float64)
    assignment = torch.zeros(batch, heads, num_queries, num_tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            channels = range(h * width, (h + 1) * width)
            for n in range(num_tokens):
                m = [sum(float(k[b, n, c] * q[b, t, c]) for c in channels) / root for t in range(num_queries)]
                z = sum(math.exp(x) for x in m)
                for t in range(num_queries):
                    assignment[b, h, t, n] = math.exp(m[t]) / z
            for t in range(num_queries):
                row = assignment[b, h, t].tolist()
                weights = {
                    "mean": [(a + eps) / sum(x + eps for x in row) for a in row],
                    "den": [a / (sum(row) + eps) for a in row],
                    "l1max": [a / max(sum(row), eps) for a in row],
                    "sum": row,
                }[normalize]
                for c in channels:
                    out[b, t, c] = sum(w * float(v[b, n, c]) for n, w in enumerate(weights))
    return out, assignment


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("heads", [1, 2])
def test_equations(normalize: str, heads: int) -> None:
    q, k, v = kv_inputs(2, 3, 5, 4)
    out, assignment = equations(q, k, v, heads, normalize, 1e-2)
    for function in (slot_attention_reference, slot_attention):
        ours, ours_map, entropy = function(
            q, k, v, num_heads=heads, normalize=normalize, eps=1e-2, return_map=True, return_entropy=True
        )
        torch.testing.assert_close(ours, out)
        torch.testing.assert_close(ours_map, assignment[:, 0] if heads == 1 else assignment)
        torch.testing.assert_close(entropy, -(assignment * assignment.log()).sum((-1, -2)))


@pytest.mark.parametrize("heads", [1, 2])
def test_absorbed_equations(heads: int) -> None:
    q, x, w_key, w_value, gamma, beta = absorbed_inputs(2, 3, 5, 4, 6)
    unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for norm, tokens in ((None, x), ((gamma, beta, 1e-5), unit * gamma + beta)):
        out, _ = equations(q, tokens @ w_key.T, tokens @ w_value.T, heads, "den", EPS)
        for function in (slot_attention_absorbed_reference, slot_attention_absorbed):
            ours = function(q, x, w_key, w_value, num_heads=heads, token_norm=norm)
            torch.testing.assert_close(ours, out)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_gradients_are_those_of_the_reference(normalize: str, heads: int) -> None:
    """In float64, with bias, mask (one image without any query), LayerNorm and the map: every gradient, to rounding."""
    q, k, v = kv_inputs(3, 4, 6, 8)
    *absorbed, gamma, beta = absorbed_inputs(3, 4, 6, 8, 10)
    (bias,) = randn((3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    options: dict[str, Any] = {"num_heads": heads, "normalize": normalize, "eps": 1e-2, "scale": 0.7}
    options["query_mask"] = mask

    def with_bias(function: Callable[..., Any], width: int) -> Callable[..., Any]:
        return lambda *x, **o: function(*x[:width], *x[width + 1 :], query_bias=x[width], **o)

    for ours, reference, inputs, width in (
        (slot_attention, slot_attention_reference, [q, k, v, bias], 3),
        (
            ours_absorbed(slot_attention_absorbed),
            ours_absorbed(slot_attention_absorbed_reference),
            [*absorbed, bias, gamma, beta],
            4,
        ),
    ):
        expected = outputs_and_gradients(with_bias(reference, width), inputs, **options)
        for name, value in outputs_and_gradients(with_bias(ours, width), inputs, **options).items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck() -> None:
    """Against finite differences: the reference's own gradients are not taken on trust."""
    q, k, v = (x.requires_grad_() for x in kv_inputs(1, 3, 4, 4))
    (bias,) = (x.requires_grad_() for x in randn((3,)))
    for normalize in NORMALIZERS:
        assert torch.autograd.gradcheck(
            lambda *x, m=normalize: slot_attention(
                *x[:3], query_bias=x[3], normalize=m, eps=0.1, return_map=True, return_entropy=True
            ),
            (q, k, v, bias),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q has shape \(2, 4\)"),
        ({"q": torch.zeros(2, 0, 8)}, "no query"),
        ({"k": torch.zeros(2, 0, 8), "v": torch.zeros(2, 0, 8)}, "no token"),
        ({"k": torch.zeros(3, 6, 8)}, r"k has shape \(3, 6, 8\); q and k ask for \(2, 6, 8\)"),
        ({"v": torch.zeros(2, 5, 8)}, "v has shape"),
        ({"v": torch.zeros(2, 6, 8, dtype=torch.float64)}, "v has dtype torch.float64 and q torch.float32"),
        ({"q": torch.zeros(2, 4, 8, dtype=torch.long)}, "a floating dtype is needed"),
        ({"num_heads": 3}, "num_heads=3 does not divide the D=8"),
        ({"normalize": "softmax"}, "use one of mean, den, l1max, sum"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"query_bias": torch.zeros(5)}, "query_bias has shape"),
        ({"query_mask": torch.ones(2, 4)}, "query_mask is torch.float32"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 8), "k": torch.zeros(2, 6, 8), "v": torch.zeros(2, 6, 8)} | change
    for function in (slot_attention, slot_attention_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 6, 10)}, r"tokens have shape \(3, 6, 10\)"),
        ({"w_key": torch.zeros(10, 8)}, r"w_key has shape \(10, 8\); q and tokens ask for \(8, 10\)"),
        ({"token_norm": (torch.ones(8), torch.zeros(10), 1e-5)}, "token_norm's gamma"),
    ],
)
def test_absorbed_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 8), "tokens": torch.zeros(2, 6, 10)}
    arguments |= {"w_key": torch.zeros(8, 10), "w_value": torch.zeros(8, 10)} | change
    for function in (slot_attention_absorbed, slot_attention_absorbed_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
