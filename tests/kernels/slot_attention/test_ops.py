"""The ops under both forms of slot attention: what torch.library and torch.compile ask of them; what they compute."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.kernels.slot_attention import (
    ops,
    slot_attention,
    slot_attention_absorbed,
)
from tests.kernels.slot_attention.checks import (
    EPS,
    absorbed_inputs,
    kv_inputs,
    outputs_and_gradients,
)


def test_gradients_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen tokens cost no token gradient."""
    asked = []
    plain = ops.plain_backward
    monkeypatch.setattr(ops, "plain_backward", lambda *a: (asked.append(a[-1]), plain(*a))[1])
    q, x, w_key, w_value, *_ = absorbed_inputs(2, 3, 5, 8, 8)
    w_key.requires_grad_()
    torch.autograd.grad(slot_attention_absorbed(q, x, w_key, w_value).sum(), w_key)
    assert asked == [False]


@pytest.mark.parametrize("form", ["keys and values", "absorbed"])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(form: str, extras: bool) -> None:
    q, k, v = (x.float().view(2, -1, 3, 8).transpose(1, 2).requires_grad_() for x in kv_inputs(2, 4, 6, 24))
    bias = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False] * 2])
    options = (0.5, "mean", EPS)
    if form == "absorbed":
        args = (q, k[:, :1], None, None, None, *options, 1e-5, extras, extras)
    else:
        args = (q, k, v, bias, mask, *options, None, extras, extras)
    torch.library.opcheck(ops.core, args)
    out, mass, *_ = (x.detach() for x in ops.core(*args))
    tensors = [x.detach() if isinstance(x, Tensor) else x for x in args[:5]]
    grad_out = torch.randn_like(out)
    grads = [torch.randn(shape) if extras else None for shape in ((2, 3, 4, 6), (2, 3))]
    backward = (grad_out, None, *grads, *tensors, mass, out, *args[5:9])
    for token_grad in (False, True):
        torch.library.opcheck(ops.core_backward, (*backward, token_grad))
    *_, coefficients, affine = ops.core_backward(*backward, True)
    affines = [affine, affine] if form == "absorbed" else []
    factors = ([coefficients] * 2, [tensors[0]] * 2, [grad_out] * 2, affines, tensors[1])
    torch.library.opcheck(ops.token_gradients, (*factors, "both" if form == "absorbed" else "queries"))


def test_compiles_without_graph_breaks(path: torch.device) -> None:
    inputs = [x.to(path, torch.float32) for x in absorbed_inputs(2, 4, 7, 16, 16)]

    def block(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **asked: bool) -> Any:
        tokens = x[:, 1:]
        out, *extras = slot_attention_absorbed(q, tokens, w_key, w_value, token_norm=(norm[0], norm[1], 1e-5), **asked)
        return slot_attention(out, tokens, tokens, num_heads=2), *extras

    expected = outputs_and_gradients(block, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(compiled, inputs).items():
        torch.testing.assert_close(value, expected[name])
