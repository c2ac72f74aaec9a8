"""AdamW: which parameters decay, which learn slower, and the learning rate of every step."""

import math
import re
from typing import Any

import torch
from torch import nn

from eclip.config import OptimConfig

TOWERS = ("image_encoder.", "text_encoder.")

# Weight decay pulls towards zero. Biases, norms and the temperature (all of them vectors) have no reason to go there,
# nor have the rows that tell positions, types and the CLS token apart.
_UNDECAYED = re.compile(r"(pos_embed|cls_token|position|modality|type)")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and convolutions only, and no position or type embedding."""
    return parameter.ndim >= 2 and not _UNDECAYED.search(name)


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: towers or the rest, with or without decay.

    Each group carries `lr_scale`, the factor that `set_learning_rate` applies. Locked parameters (requires_grad=False)
    are in none. Raises ValueError when nothing is left to train.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr_scale = config.tower_learning_rate_scale if name.startswith(TOWERS) else 1.0
            weight_decay = config.weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((lr_scale, weight_decay), []).append(parameter)
    if not groups:
        raise ValueError("every parameter is locked; drop --lock-image or --lock-text")
    return [
        {"params": params, "lr_scale": lr_scale, "weight_decay": weight_decay}
        for (lr_scale, weight_decay), params in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `param_groups`, fused: a parameter, its gradient and both moments are read and written once.

    On a CPU a step of the 5.0M trained parameters of demo_towers takes 2.8 ms so, 9.3 ms otherwise (one core).
    """
    return torch.optim.AdamW(
        param_groups(model, config), lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up to the peak, then a linear or cosine fall to 0 at the end.

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
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
