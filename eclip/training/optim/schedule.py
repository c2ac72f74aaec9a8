"""The learning rate's course."""

import math

import torch

from eclip.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig, *, share: float = 1.0) -> float:
    """Learning rate of step `step` (from 0): linear warm-up to the peak, then a linear or cosine fall to 0 at the end.

    share: the step's global batch over the largest of the batch schedule. `config.learning_rate` is that of the
    largest; by `lr_scaling` a step takes 1 (none), sqrt(share) (sqrt) or share (linear) times as much. Linear keeps the
    noise of an SGD step per product (Goyal et al. 2017, arXiv 1706.02677), sqrt that of Adam's (Malladi et al. 2022,
    arXiv 2205.10287). A pure function of the step, so that a resumed run needs no scheduler state.
    """
    return _factor(config, share) * _unscaled(step, total_steps, config)


def _factor(config: OptimConfig, share: float) -> float:
    match config.lr_scaling:
        case "none":
            return 1.0
        case "sqrt":
            return math.sqrt(share)
        case "linear":
            return share


def _unscaled(step: int, total_steps: int, config: OptimConfig) -> float:
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (1 - progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group `value` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]
