"""The optimizer of a run: made, checked before the start, stepped, and what a checkpoint knows of it."""

import torch
from torch import Tensor, nn

from eclip.config import OptimConfig, RunConfig
from eclip.setting_rules import require
from eclip.training.optim.apex_adam import ApexAdam, check_apex
from eclip.training.optim.groups import param_groups
from eclip.training.optim.muon import MuonAdamW


def check_optimizer(config: RunConfig) -> None:
    """Raise ValueError when the optimizer cannot work on this machine, or a setting of it would do nothing."""
    optim, name = config.optim, config.optim.optimizer
    require(
        name == "adamw" or not config.compute.cpu_offload,
        f"--optimizer {name} with --cpu-offload: it works on a GPU; use --optimizer adamw",
    )
    locked = config.lock_image and config.lock_text and not config.unlock_last
    require(
        optim.layer_decay == 1 or not locked,
        f"--layer-decay {optim.layer_decay} with --lock-image and --lock-text: no block of a tower learns; leave it "
        f"out, or give --unlock-last",
    )
    if name == "apex_adam":
        check_apex()


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` over `param_groups`, for a model that is sharded or not.

    AdamW is fused: a parameter, its gradient and both moments are read and written once. On a CPU a step of the 5.0M
    trained parameters of demo_towers takes 2.8 ms so, 9.3 ms otherwise (one core).
    """
    groups, lr, betas = param_groups(model, config), config.learning_rate, (config.beta1, config.beta2)
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        case "apex_adam":
            return ApexAdam(groups, lr=lr, betas=betas)
        case "muon":
            return MuonAdamW(groups, lr=lr, betas=betas)


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Take a step where `finite` is True; where it is False nothing changes: no parameter, moment or step counter.

    finite: 0-dim bool, the same on all ranks, on any device. AdamW decides on the device, as under a GradScaler, and
    the host does not wait; for Muon and apex it reads `finite` first. (With --cpu-offload it has to be copied anyway.)
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        if finite:
            optimizer.step()
        return
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = (~finite).to(device, torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def fresh_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's state before its first step, laid out as the parameter is: what a checkpoint is loaded into."""
    if isinstance(optimizer, ApexAdam):
        return optimizer.fresh_state(parameter)
    if isinstance(optimizer, MuonAdamW) and (state := optimizer.fresh_state(parameter)) is not None:
        return state
    assert isinstance(optimizer, torch.optim.AdamW | MuonAdamW), f"what state does {type(optimizer).__name__} keep?"
    return {
        "step": torch.zeros((), device=parameter.device),  # fused: there, and not on the host
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def describe_switch(old: OptimConfig, new: OptimConfig) -> str | None:
    """What a run that is resumed with another optimizer keeps of the former one's state; None for the same one."""
    if old.optimizer == new.optimizer:
        return None
    begins = f"--optimizer {new.optimizer} after {old.optimizer}: "
    if "muon" not in (old.optimizer, new.optimizer):
        return begins + "the moments are kept"
    return begins + "the matrices of the blocks start without momentum, the moments of the rest are kept"
