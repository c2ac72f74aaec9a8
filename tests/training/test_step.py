"""What a step leaves alone (locked parts and the momentum model are as at inference), and that it waits for nothing."""

import dataclasses
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from torch import nn

from eclip.dataloading.schema import count_titles
from eclip.objectives.settings import ObjectiveConfig
from eclip.presets import PRESETS
from eclip.training.accumulation import accumulate
from eclip.training.build import build_model
from eclip.training.momentum import make_momentum, update_momentum
from eclip.training.step import Part, TrainStep, use_bf16
from tests.host_waits import DEVICE, no_host_waits, on_device
from tests.model.tiny import TINY
from tests.objectives.batches import make_batch
from tests.training.parts import make_parts
from tests.training.run_folders import ALONE


def test_locked_parts_and_the_momentum_model_stay_in_eval_mode() -> None:
    config = dataclasses.replace(PRESETS["debug"], lock_image=True)
    model = build_model(config)
    step = TrainStep(model, make_momentum(model), config, ALONE).train()
    assert model.text_encoder.training
    assert not model.image_encoder.training
    assert step.momentum is not None
    assert not any(module.training for module in step.momentum.modules())


def test_bfloat16_is_for_gpus() -> None:
    config = dataclasses.replace(PRESETS["debug"], bf16=True)
    assert not use_bf16(config, ALONE)
    gpu = dataclasses.replace(ALONE, device=torch.device("cuda"))
    assert use_bf16(config, gpu)
    assert not use_bf16(dataclasses.replace(config, bf16=False), gpu)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("objective", ["eclip", "clip"])
def test_the_host_never_waits_for_the_device(objective: Literal["eclip", "clip"], parts: int) -> None:
    """From the parts on the device to the momentum model's move: what a step tells the GPU, it tells without asking.

    All but the optimizer, whose fused kernel knows no "meta": test_no_waits_gpu.py has it too.
    """
    config = dataclasses.replace(
        PRESETS["debug"],
        model=dataclasses.replace(TINY, max_positions=64),
        objective=ObjectiveConfig(objective=objective, token_keep=0.5),
    )
    model = build_model(config).to(DEVICE)
    momentum = make_momentum(model) if objective == "eclip" else None
    step = TrainStep(model, momentum, config, ALONE).train()
    made = [_on_device(part) for part in make_parts(make_batch(12), parts, step.objective, TINY)]
    trained = [p for p in model.parameters() if p.requires_grad]
    with no_host_waits():
        if parts == 1:
            losses = step("losses", made[0], observe=True)
            losses["loss"].backward()
        else:
            losses = accumulate(step, step, made, lambda last: nullcontext(), observe=True)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        finite = torch.stack([*losses.values(), norm]).isfinite().all()
        model.clamp_logit_scale()
        if momentum is not None:
            update_momentum(model, momentum, 0.99, finite=finite)


def _on_device(part: Part) -> Part:
    counted = dataclasses.replace(part.batch, **_counts(part))
    return Part(counted.map(on_device), None, part.draws.map(on_device))


def _counts(part: Part) -> dict[str, tuple[int, int]]:
    """As the loader counts titles."""
    counts, longest = count_titles(part.batch.cu_seqlens)
    return {"token_counts": counts, "longest": longest}
