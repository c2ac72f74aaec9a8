"""A plain FusedAdam with the habits of NVIDIA apex's, and a way to put it where apex would be."""

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class FusedAdam(torch.optim.Optimizer):
    """What apex's does, in plain PyTorch: one step counter a group, plain and contiguous tensors, no empty one."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        assert adam_w_mode
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.sizes = [len(group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        # apex pairs its groups with a list made at the start: others would be left out without a word.
        assert self.sizes == [len(group["params"]) for group in self.param_groups]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                for x in (p, p.grad, m, v):
                    assert not isinstance(x, DTensor) and not isinstance(x.data, DTensor)
                    assert x.is_contiguous() and x.numel() and x.dtype == torch.float32
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).add_(p.grad * p.grad, alpha=1 - beta2)
                m_hat, v_hat = m / (1 - beta1 ** group["step"]), v / (1 - beta2 ** group["step"])
                p.sub_(group["lr"] * (m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p))


def modules(fused_adam: Any = FusedAdam) -> dict[str, ModuleType]:
    """`apex` and `apex.optimizers`, for sys.modules."""
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    apex.__path__ = []  # a package
    apex.optimizers = optimizers  # type: ignore[attr-defined]
    optimizers.FusedAdam = fused_adam  # type: ignore[attr-defined]
    return {"apex": apex, "apex.optimizers": optimizers}


def install() -> None:
    """For a process of its own."""
    sys.modules.update(modules())
