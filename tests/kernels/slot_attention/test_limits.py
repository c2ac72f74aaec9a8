"""Slot attention at its limits: LayerNorm without epsilon, sizes as symbols, wide tokens, the order of the grid."""

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from eclip.kernels import launch
from eclip.kernels.slot_attention import (
    MAX_KERNEL_DIM,
    share_tokens,
    slot_attention,
    slot_attention_absorbed,
    slot_attention_absorbed_reference,
)
from tests.kernels.slot_attention.checks import (
    absorbed_inputs,
    check,
    eager,
    eager_absorbed,
    kv_inputs,
    ours_absorbed,
    outputs_and_gradients,
)


@pytest.mark.parametrize("tokens", [2, 37, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_without_epsilon(
    path: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int
) -> None:
    """Rows that pad a tile have no variance; 1 / sqrt(0) of theirs must not reach the real ones. bf16 runs the one-pass
    kernel, fp32 the general one, 150 tokens over several programs."""
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 3)

    def ours(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **options: Any) -> Any:
        return slot_attention_absorbed(q, x, w_key, w_value, token_norm=(*norm, 0.0), **options)

    def plain(q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, *norm: Tensor, **options: Any) -> Any:
        return eager_absorbed(q, F.layer_norm(x, x.shape[-1:], *norm, eps=0.0), w_key, w_value, **options)

    check(path, ours, plain, absorbed_inputs(2, 7, tokens, 32, 96), dtype)


@pytest.mark.parametrize("norm_eps", [-1e-6, float("nan")])
def test_an_epsilon_that_is_no_variance_is_named(norm_eps: float) -> None:
    q, x, w_key, w_value, gamma, beta = absorbed_inputs(1, 2, 3, 8, 8)
    for function in (slot_attention_absorbed, slot_attention_absorbed_reference):
        with pytest.raises(ValueError, match=rf"token_norm's eps={norm_eps} must be 0 or more"):
            function(q, x, w_key, w_value, token_norm=(gamma, beta, norm_eps))


def test_compiles_with_every_number_a_symbol() -> None:
    """Under dynamic=True every size and every number passed is a symbol, which no check may format before it fails."""

    def block(
        q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor, mask: Tensor,
        eps: float, norm_eps: float, scale: float,
    ) -> Tensor:  # fmt: skip
        tokens, ports = share_tokens(x, 2, num_queries=q.shape[1])
        options: dict[str, Any] = {"eps": eps, "scale": scale, "query_mask": mask, "query_bias": bias}
        for port in ports:
            norm = (gamma, beta, norm_eps)
            q = q + slot_attention_absorbed(q, tokens, w_key, w_value, token_norm=norm, port=port, **options)
        return slot_attention(q, x, x, num_heads=2, **options)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, queries, tokens, eps, norm_eps in ((2, 4, 7, 1e-6, 1e-5), (3, 5, 9, 1e-5, 1e-6), (4, 6, 8, 1e-4, 1e-3)):
        inputs = [x.requires_grad_() for x in absorbed_inputs(batch, queries, tokens, 16, 16)]
        others = torch.zeros(queries), torch.ones(batch, queries, dtype=torch.bool), eps, norm_eps, 0.3
        ours, expected = compiled(*inputs, *others), block(*inputs, *others)
        torch.testing.assert_close(ours, expected)
        for a, b in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b)


# 1152: SigLIP so400m; 1408: ViT-g; 1664: ViT-bigG. With 7 queries the one-pass kernel holds up to 1408, with 20 up to
# 1152 channels, the general one any number.
@pytest.mark.parametrize(("queries", "channels"), [(20, 1152), (7, 1408), (20, 1408), (3, 1664)])
def test_tokens_of_wide_towers(path: torch.device, queries: int, channels: int) -> None:
    inputs = absorbed_inputs(1, queries, 19, 32, channels)
    check(path, ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs[:4], torch.bfloat16)
    check(path, ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs, torch.bfloat16)


def test_wide_keys_and_values(path: torch.device) -> None:
    check(path, slot_attention, eager, kv_inputs(1, 5, 9, 1152))


def test_slices_of_an_image_are_neighbours_in_the_grid(
    interpreter: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs start in the order of their numbers: those that read the same tokens must follow one another."""
    q, k, v = (x.float() for x in kv_inputs(3, 64, 5, 320))  # three slices of 128 channels at 64 queries
    image_bytes = k[0].numel() * k.element_size()
    images: dict[int, set[int]] = collections.defaultdict(set)
    load = triton_interpreter.InterpreterBuilder.create_masked_load

    def recorded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        places = pointers.data[mask.data.astype(bool)].astype("int64") - k.data_ptr()
        inside = places[(places >= 0) & (places < 3 * image_bytes)]
        images[int(self.grid_idx[0])] |= set((inside // image_bytes).tolist())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_masked_load", recorded)
    slot_attention(q, k, v)
    assert [images[program] for program in sorted(images)] == [{0}] * 3 + [{1}] * 3 + [{2}] * 3


@pytest.mark.gpu
def test_the_widest_tokens_of_the_gpu_kernel() -> None:
    device = torch.device("cuda")
    inputs = absorbed_inputs(2, 20, 33, 64, MAX_KERNEL_DIM)
    check(device, ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs, torch.bfloat16)
    wider = [x.to(device, torch.bfloat16) for x in absorbed_inputs(1, 2, 3, 8, MAX_KERNEL_DIM + 1)[:4]]
    with pytest.raises(ValueError, match=f"channels={MAX_KERNEL_DIM + 1}"):
        outputs_and_gradients(slot_attention_absorbed, wider)
