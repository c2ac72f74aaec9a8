"""What a step leaves alone: locked parts and the momentum model stay as at inference."""

import dataclasses

import torch

from eclip.presets import PRESETS
from eclip.training.build import build_model
from eclip.training.momentum import make_momentum
from eclip.training.step import TrainStep, use_bf16
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
