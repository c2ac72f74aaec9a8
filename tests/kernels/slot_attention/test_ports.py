"""Tokens that several calls of slot attention share: one gradient of them, however the calls are run."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eclip.kernels.slot_attention import (
    share_tokens,
    slot_attention_absorbed,
)
from tests.kernels.slot_attention.checks import (
    absorbed_inputs,
    check,
    eager_absorbed,
    outputs_and_gradients,
)


def chain(
    q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, shared: bool, recompute: bool = False, **o: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Three calls on the same tokens, the second without LayerNorm; the last map, the sum of entropies."""
    tokens, ports = x, [None] * 3
    if shared:
        tokens, ports = share_tokens(x, 4, num_queries=q.shape[1], num_heads=o.get("num_heads", 1))  # the last unused
    total: Any = 0

    def attend(q: Tensor, token_norm: Any, port: Any) -> Any:
        return slot_attention_absorbed(q, tokens, w_key, w_value, token_norm=token_norm, port=port, **o)

    for i, port in zip(range(3), ports, strict=False):
        token_norm = (*norm, 1e-5) if norm and i != 1 else None
        run = functools.partial(checkpoint, attend, use_reentrant=False) if recompute else attend
        out, assignment, entropy = run(q, token_norm, port)
        q, total = q + out, total + entropy
    return q, assignment, total


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("how", ["eager", "recompute", "compile"])
def test_shared_tokens_get_the_sum_of_all_gradients(how: str, norm: bool, heads: int) -> None:
    """The factors, multiplied out at the end, against autograd's own addition; in float64, to rounding."""
    inputs = absorbed_inputs(2, 4, 7, 16, 12)[: 6 if norm else 4]
    expected = outputs_and_gradients(functools.partial(chain, shared=False), inputs, num_heads=heads)
    run = functools.partial(chain, shared=True, recompute=how == "recompute")
    if how == "compile":
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(run, inputs, num_heads=heads).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shared_tokens_on_every_path(path: torch.device, dtype: torch.dtype) -> None:
    inputs = absorbed_inputs(2, 20, 37, 48, 64)

    def plain(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **o: Any) -> Any:
        total: Any = 0
        for i in range(3):
            out, assignment, entropy = eager_absorbed(q, x, w_key, w_value, *(() if i == 1 else norm), **o)
            q, total = q + out, total + entropy
        return q, assignment, total

    check(path, functools.partial(chain, shared=True), plain, inputs, dtype)


def test_shared_tokens_that_want_no_gradient(path: torch.device) -> None:
    q, x, *weights = (x.to(path, torch.float32) for x in absorbed_inputs(2, 4, 7, 16, 12)[:4])
    q.requires_grad_()
    tokens, (port,) = share_tokens(x, 1, num_queries=4)
    with_port = torch.autograd.grad(slot_attention_absorbed(q, tokens, *weights, port=port).sum(), q)
    torch.testing.assert_close(with_port, torch.autograd.grad(slot_attention_absorbed(q, x, *weights).sum(), q))


def test_sharing_casts_once_under_autocast() -> None:
    q, x, *weights = (x.float() for x in absorbed_inputs(2, 4, 7, 16, 12)[:4])
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, (port,) = share_tokens(x, 1, num_queries=4)
        out = slot_attention_absorbed(q, tokens, *weights, port=port)
    assert tokens.dtype == out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert gradient.dtype == torch.float32


def test_mistakes_with_ports_are_named() -> None:
    q, x, *weights = (x.float() for x in absorbed_inputs(2, 4, 7, 16, 12)[:4])
    tokens, (port,) = share_tokens(x, 1, num_queries=4)
    with pytest.raises(ValueError, match=r"port is for torch.float32 queries of shape \(2, 1, 4, 12\)"):
        slot_attention_absorbed(q, tokens, *weights, num_heads=2, port=port)
    with pytest.raises(ValueError, match="pass those that share_tokens returned"):
        slot_attention_absorbed(q, x.requires_grad_(), *weights, port=port)
    tokens, (port,) = share_tokens(x.detach().requires_grad_(), 1, num_queries=4)
    slot_attention_absorbed(q, tokens, *weights, port=port)
    with pytest.raises(ValueError, match="this port served another call already"):
        slot_attention_absorbed(q, tokens, *weights, port=port)
    with pytest.raises(ValueError, match="uses=0"):
        share_tokens(x, 0, num_queries=4)
    with pytest.raises(ValueError, match=r"tokens have shape \(7, 12\)"):
        share_tokens(x[0], 1, num_queries=4)
