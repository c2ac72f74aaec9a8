"""What the launchers of slot attention choose: several programs an image, blocks of other GPUs, the order of sums."""

import pytest
import torch
from torch import Tensor

from eclip.kernels import launch
from eclip.kernels.slot_attention import (
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


def test_wide_channels_take_several_programs(path: torch.device) -> None:
    check(path, slot_attention, eager, kv_inputs(1, 20, 20, 544))
    check(path, ours_absorbed(slot_attention_absorbed), eager_absorbed, absorbed_inputs(1, 20, 20, 32, 544))


@pytest.mark.parametrize("multiprocessors", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_few_images_split_their_tokens(
    path: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, multiprocessors: int
) -> None:
    """Over several programs, whose sums are added; in bf16 by the one-pass kernel, in fp32 by the general one."""
    monkeypatch.setattr(launch, "multiprocessors", lambda _: multiprocessors)
    inputs = absorbed_inputs(1, 7, 150, 96, 96)
    for normalize in ("mean", "den"):
        absorbed = ours_absorbed(slot_attention_absorbed)
        check(path, absorbed, eager_absorbed, inputs, dtype, normalize=normalize)


@pytest.mark.parametrize("generation", [8, 10])
def test_blocks_of_other_generations(
    interpreter: torch.device, monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    """Block sizes depend on the GPU; everywhere else the interpreter takes those of Hopper."""
    monkeypatch.setattr(launch, "gpu_generation", lambda _: generation)
    for queries in (8, 20, 64):
        check(interpreter, slot_attention, eager, kv_inputs(1, queries, 150, 64), torch.bfloat16, normalize="mean")
        inputs = absorbed_inputs(1, queries, 150, 32, 96)
        check(interpreter, ours_absorbed(slot_attention_absorbed), eager_absorbed, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_repeat_to_the_bit(dtype: torch.dtype) -> None:
    """No atomics: the same inputs give the same bits, whatever else runs on the GPU."""
    inputs = [x.to("cuda", dtype) for x in absorbed_inputs(64, 20, 196, 768, 768)]
    first, second = (outputs_and_gradients(ours_absorbed(slot_attention_absorbed), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_more_images_than_a_grid_has_rows() -> None:
    """65,535 is the limit of a grid's second and third axis."""
    q, x = (torch.randn(70_000, n, 16, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (3, 5))
    weight = torch.eye(16, device="cuda", dtype=torch.bfloat16)
    out = slot_attention_absorbed(q, x, weight, weight)
    assert isinstance(out, Tensor)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, x))
    exact = slot_attention_absorbed_reference(q[-2:].double(), x[-2:].double(), weight.double(), weight.double())
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(out[-2:].double(), exact, atol=2e-2, rtol=2e-2)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.gpu
def test_limits_of_the_gpu_kernel_are_named() -> None:
    q, k, v = (x.to("cuda", torch.float32) for x in kv_inputs(1, 65, 4, 16))
    with pytest.raises(ValueError, match="T=65"):
        slot_attention(q, k, v)
    with pytest.raises(ValueError, match="float64"):
        slot_attention(q.double(), k.double(), v.double())
