"""FLOPs of a step: by hand, against the same step without what is done twice, and with our kernels in it."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig
from eclip.parallel.recompute import checkpoint_activations
from eclip.presets import PRESETS
from eclip.training.accumulation import accumulate
from eclip.training.metrics.flops import ModelFlops, overhead
from eclip.training.momentum import make_momentum
from eclip.training.step import TrainStep
from tests.model.tiny import TINY
from tests.objectives.batches import make_batch
from tests.training.parts import make_parts
from tests.training.run_folders import ALONE

B, N, D = 3, 5, 16


def counted(work) -> int:
    with ModelFlops() as counter:
        work()
    return counter.total


def test_a_layer_by_hand() -> None:
    layer, x = nn.Linear(D, 2 * D), torch.randn(B, D)
    product = 2 * B * D * 2 * D
    assert counted(lambda: layer(x)) == product
    assert counted(lambda: layer(x).sum().backward()) == 2 * product  # x wants no gradient
    assert counted(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * product
    with torch.inference_mode():
        assert counted(lambda: layer(x)) == product


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_hand(masked: bool) -> None:
    """Two products forward and four backward, whatever the backward makes again: PyTorch counts five, or on a CPU 0."""
    q, k, v = (torch.randn(B, 4, N, D, requires_grad=True) for _ in range(3))
    mask = torch.ones(B, 1, 1, N, dtype=torch.bool) if masked else None
    product = 2 * B * 4 * N * N * D
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) == 2 * product
    work = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum()
    assert counted(work.backward) == 4 * product


GPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward: 4,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: 4,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: 4,
    torch.ops.aten._scaled_dot_product_flash_attention: 2,
}


@pytest.mark.parametrize("packet", GPU_ATTENTION, ids=str)
def test_attention_of_gpus_is_known(packet) -> None:
    formula = ModelFlops()._formulas[packet]
    shape = torch.empty(B, 4, N, D, device="meta")
    arguments = [shape] * (4 if "backward" in str(packet) else 3)
    assert formula(*arguments, out_val=shape) == GPU_ATTENTION[packet] * 2 * B * 4 * N * N * D


def test_varlen_attention_is_known() -> None:
    """Of a packed batch its sequences count, not the padding of them."""
    pytest.importorskip("torch.nn.attention.varlen")
    ops, formulas = torch.ops.torch_attn, ModelFlops()._formulas
    rows, bounds = torch.empty(7, 4, D), torch.tensor([0, 2, 7], dtype=torch.int32)
    product = 2 * 4 * D * (2 * 2 + 5 * 5)
    assert formulas[ops._varlen_attn](rows, rows, rows, bounds, bounds, 5, 5, out_val=rows) == 2 * product
    backward = formulas[ops._varlen_attn_backward]
    assert backward(rows, rows, rows, rows, rows, rows, bounds, bounds, 5, 5, out_val=rows) == 4 * product


def test_recomputation_does_not_count() -> None:
    layers = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
    x = torch.randn(B, D, requires_grad=True)
    plain = counted(lambda: layers(x).sum().backward())
    assert counted(lambda: checkpoint(layers, x, use_reentrant=False).sum().backward()) == plain
    with FlopCounterMode(display=False) as theirs:
        checkpoint(layers, x, use_reentrant=False).sum().backward()
    assert theirs.get_total_flops() > plain


def test_overhead_does_not_count() -> None:
    layer, x = nn.Linear(D, D), torch.randn(B, D)

    def work() -> None:
        with overhead(), overhead():
            layer(x)
        layer(x)

    assert counted(work) == 2 * B * D * D
    with pytest.raises(KeyError), overhead():
        raise KeyError
    assert counted(lambda: layer(x)) == 2 * B * D * D


def make_step(*, recompute: str = "none", kernels: str = "auto", objective: str = "eclip") -> TrainStep:
    data = dataclasses.replace(PRESETS["debug"].data, max_tokens=TINY.max_positions)
    model_config = dataclasses.replace(TINY, kernels=kernels)
    config = dataclasses.replace(
        PRESETS["debug"], model=model_config, data=data, objective=ObjectiveConfig(objective=objective)
    )
    torch.manual_seed(0)
    model = ECLIP(model_config)
    momentum = make_momentum(model) if make_objective(config.objective).needs_momentum else None
    step = TrainStep(model, momentum, config, ALONE).train()
    checkpoint_activations(step, recompute)
    return step


def step_flops(step: TrainStep, parts: int = 1, *, counter=ModelFlops) -> int:
    made = make_parts(make_batch(8), parts, step.objective, step.model.config)

    def work() -> None:
        if parts > 1:
            accumulate(step, step, made, lambda last: nullcontext())
        else:
            step("losses", made[0])["loss"].backward()

    return counted(work)


@pytest.mark.parametrize("recompute", ["blocks", "selective"])
def test_activation_checkpointing_does_not_inflate_a_step(recompute: str) -> None:
    assert step_flops(make_step(recompute=recompute)) == step_flops(make_step())


@pytest.mark.parametrize("objective", ["eclip", "clip"])
def test_a_step_on_micro_batches_counts_as_one_on_the_whole(objective: str) -> None:
    """But for the scores of padded titles, whose length is that of a part's longest: at most those differ."""
    whole, split = (step_flops(make_step(objective=objective), parts) for parts in (1, 4))
    assert split == pytest.approx(whole, rel=0.02)
    assert split <= whole


def test_a_step_of_several_passes_by_its_stages() -> None:
    """The whole step is three times a forward pass of the model, and one of the momentum model; products of the inputs
    (of pixels, of prompts without gradient) have two."""
    step = make_step()
    part = make_parts(make_batch(8), 1, step.objective, step.model.config)[0]
    with torch.no_grad():
        once = counted(lambda: step("losses", part))
        momentum = counted(lambda: step.objective.encode_momentum(step.momentum, part.batch, None, part.draws))
    online = once - 2 * momentum  # its own towers are as large as the momentum model's; what is left: decoders, losses
    assert once + 2 * momentum < step_flops(step) < 3 * once
    assert online > 0


def test_our_kernels_are_in_it() -> None:
    """Against the reference, which projects all tokens to keys and values where we absorb the projections."""
    ours, reference = step_flops(make_step()), step_flops(make_step(kernels="reference"))
    assert ours < reference
    names = {"eclip.slot_attention", "eclip.slot_attention_backward", "eclip.slot_attention_token_gradients"}
    assert names | {"eclip.pair_total", "eclip.pair_gradients"} <= set(map(str, ModelFlops()._formulas))


def test_a_result_is_the_same_while_it_is_counted() -> None:
    step = make_step()
    part = make_parts(make_batch(8), 1, step.objective, step.model.config)[0]

    def take() -> tuple[Tensor, Tensor]:
        step.zero_grad()
        loss = step("losses", part)["loss"]
        loss.backward()
        return loss.detach(), step.model.image_projection.weight.grad.clone()

    plain = take()
    with ModelFlops():
        seen = take()
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
