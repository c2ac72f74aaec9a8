"""Corners of slot attention on every path: queries that win nothing or are absent, strided tokens, an empty batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.kernels.slot_attention import (
    NORMALIZERS,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_reference,
)
from tests.kernels.slot_attention.checks import (
    absorbed_inputs,
    kv_inputs,
    ours_absorbed,
    outputs_and_gradients,
    randn,
)


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dead_query(path: torch.device, normalize: str, dtype: torch.dtype) -> None:
    """A query that wins nothing: no 0 / 0 (1e-8 is 0 in fp16), and `mean` gives it the mean of the values."""
    q, k, v = (x.to(path, dtype).requires_grad_() for x in kv_inputs(2, 4, 9, 16))
    bias = torch.tensor([0.0, -1e4, 0.0, 0.0], device=path)
    out, assignment, entropy = slot_attention(
        q, k, v, query_bias=bias, normalize=normalize, eps=1e-8, return_map=True, return_entropy=True
    )
    assert not assignment[:, 1].any()
    assert isinstance(entropy, Tensor) and entropy.isfinite().all()
    expected = v.mean(1) if normalize == "mean" else torch.zeros_like(out[:, 1])
    torch.testing.assert_close(out[:, 1], expected, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=0)
    gradients = torch.autograd.grad(out.float().square().sum() + entropy.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_absent_queries_change_nothing(path: torch.device, normalize: str) -> None:
    q, k, v = (x.to(path, torch.float32) for x in kv_inputs(2, 5, 9, 16))
    mask = torch.tensor([[True, False, True, True, False], [False] * 5], device=path)
    asked: dict[str, Any] = {"normalize": normalize, "return_map": True, "return_entropy": True}
    out, assignment, entropy = slot_attention(q, k, v, query_mask=mask, **asked)
    alone, alone_map, alone_entropy = slot_attention(q[:1, mask[0]], k[:1], v[:1], **asked)
    torch.testing.assert_close(out[:1, mask[0]], alone)
    torch.testing.assert_close(assignment[:1, mask[0]], alone_map)
    torch.testing.assert_close(entropy, torch.cat([alone_entropy, torch.zeros_like(alone_entropy)]))
    assert not out[~mask].any() and not assignment[~mask].any()


@pytest.mark.parametrize("shape", ["shared", "per image"])
def test_query_bias(path: torch.device, shape: str) -> None:
    q, k, v = (x.float() for x in kv_inputs(2, 5, 9, 16))
    (bias,) = randn((5,) if shape == "shared" else (2, 5))
    expected = slot_attention_reference(q, k, v, query_bias=bias.float(), num_heads=2)
    ours = slot_attention(q.to(path), k.to(path), v.to(path), query_bias=bias.float().to(path), num_heads=2)
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_strided_tokens_are_read_in_place(path: torch.device) -> None:
    """Patch tokens are `x[:, 1:]` of the encoder's output; rows may be a slice of wider ones."""
    q, x, w_key, w_value, *_ = (x.to(path, torch.float32) for x in absorbed_inputs(3, 4, 10, 16, 32))
    view = x[:, 1:, 8:24]
    weights = w_key[:, :16].contiguous(), w_value[:, :16].contiguous()
    torch.testing.assert_close(
        slot_attention_absorbed(q, view, *weights), slot_attention_absorbed(q, view.contiguous(), *weights)
    )
    torch.testing.assert_close(slot_attention(q, view, view), slot_attention(q, view.contiguous(), view.contiguous()))


def test_empty_batch(path: torch.device) -> None:
    q, k, v = (x.to(path, torch.float32).requires_grad_() for x in kv_inputs(0, 4, 9, 16))
    out, assignment = slot_attention(q, k, v, return_map=True)
    assert out.shape == (0, 4, 16) and assignment.shape == (0, 4, 9)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    weights = torch.ones(16, 16, device=path, requires_grad=True)
    gradient = torch.autograd.grad(slot_attention_absorbed(q, k, weights, weights).sum(), weights)[0]
    assert gradient.shape == (16, 16) and not gradient.any()


def test_every_output_element_is_written(path: torch.device) -> None:
    """Uninitialised memory is filled with NaN; padding to block sizes must leave none behind."""
    inputs = [x.to(path, torch.float32) for x in kv_inputs(2, 7, 37, 40)]
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and inputs[0].new_empty(3).isnan().all()
        values = outputs_and_gradients(slot_attention, inputs)
    finally:
        torch.use_deterministic_algorithms(was)
    for name, value in values.items():
        assert value.isfinite().all(), name


def test_inputs_are_not_written(path: torch.device) -> None:
    inputs = [x.to(path, torch.float32) for x in absorbed_inputs(2, 5, 9, 16, 24)]
    before = [x.clone() for x in inputs]
    outputs_and_gradients(ours_absorbed(slot_attention_absorbed), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
