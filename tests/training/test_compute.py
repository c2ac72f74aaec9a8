"""What a step is told to compute with reaches it, and is said."""

import dataclasses
from typing import Any

import pytest
import torch

from eclip.parallel.settings import ComputeConfig
from eclip.presets import PRESETS
from eclip.training.build import build_model
from eclip.training.compute import apply_compute
from eclip.training.momentum import make_momentum
from eclip.training.step import TrainStep
from tests.training.run_folders import ALONE


def _step(**compute: Any) -> tuple[TrainStep, str]:
    config = dataclasses.replace(PRESETS["debug"], compute=ComputeConfig(**compute))
    model = build_model(config)
    step = TrainStep(model, make_momentum(model), config, ALONE).train()
    called, said = apply_compute(step, config, ALONE)
    assert called is step, "one process calls the step itself"
    return step, said


def test_by_default_nothing_is_done() -> None:
    step, said = _step()
    assert said == "text attention padded"
    assert all("forward" not in vars(module) for module in step.modules())


def test_every_setting_reaches_both_models() -> None:
    step, said = _step(activation_checkpointing="blocks", compile=True, residual="bf16")
    momentum = step.momentum
    assert momentum is not None
    blocks = [*step.model.image_encoder.blocks, *step.model.text_encoder.blocks, *step.model.instance_decoder.blocks]
    assert all("forward" in vars(block) for block in blocks)
    assert all("forward" not in vars(block) for block in momentum.image_encoder.blocks), "it has no backward pass"
    compiled = [module for module in step.modules() if getattr(module, "_compiled_call_impl", None) is not None]
    assert len(compiled) == 2 * len(blocks)
    for model in (step.model, momentum):
        assert model.image_encoder.blocks[0].norm1.residual_dtype == torch.bfloat16
    assert "activation checkpointing blocks" in said
    assert "blocks compiled" in said


def test_what_has_no_effect_is_said() -> None:
    assert "--residual bf16 has no effect" in _step(residual="bf16")[1]


def test_text_attention_that_does_not_work_here_is_refused() -> None:
    with pytest.raises(ValueError, match="--text-attention varlen does not work on cpu"):
        _step(text_attention="varlen")
