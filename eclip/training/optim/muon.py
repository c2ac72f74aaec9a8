"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) for the matrices of the blocks, AdamW for the rest.

Muon turns the momentum of a matrix into the nearest orthogonal one, which needs the whole matrix. Under FSDP2 a rank
holds rows of it: momentum, decay and the step itself are done on these, the update in between is gathered, one matrix
at a time, and made orthogonal by every rank for itself. torch's Muon on the shards themselves sums its products across
ranks in bfloat16, in each of five iterations, and fails where a rank holds no row (torch 2.13, 2 ranks).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

# Keller Jordan's value, and torch's default.
MOMENTUM = 0.95


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `muon` are matrices and take torch's Muon, the others fused AdamW.

    Both at one learning rate and decay: Muon's steps are scaled to the root mean square of AdamW's
    (`match_rms_adamw`). Nesterov momentum, as torch's default. One `state` for all, keyed by parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr})
        # The groups are shared, dictionaries and all: a new learning rate reaches both.
        self._adamw = torch.optim.AdamW(
            [group for group in self.param_groups if not group["muon"]], lr=lr, betas=betas, fused=True
        )
        self._adamw.state = self.state
        # torch's rule for one matrix at a time, less what is done on the shards.
        self._orthogonal = torch.optim.Muon(
            [nn.Parameter(torch.zeros(1, 1))],
            momentum=0,
            nesterov=False,
            weight_decay=0,
            adjust_lr_fn="match_rms_adamw",
        )

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor] | None:
        """The state of a matrix before its first step; None for AdamW's parameters."""
        matrices = (p for group in self.param_groups if group["muon"] for p in group["params"])
        return {"momentum_buffer": torch.zeros_like(parameter)} if any(p is parameter for p in matrices) else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step. Under FSDP2 all ranks must call it."""
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])
        self._adamw.step()

    def _move(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        gradient = cast(Tensor, parameter.grad)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        step = self._make_orthogonal(gradient.lerp(momentum, MOMENTUM), lr)
        parameter.mul_(1 - lr * weight_decay).add_(step)

    def _make_orthogonal(self, update: Tensor, lr: float) -> Tensor:
        """The step that torch's Muon takes on the whole matrix, spread as `update` is."""
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        matrix = nn.Parameter(torch.zeros_like(whole))
        matrix.grad = whole
        (group,) = self._orthogonal.param_groups
        group.update(params=[matrix], lr=lr)
        self._orthogonal.step()
        self._orthogonal.state.clear()
        step = matrix.detach()
        if isinstance(update, DTensor):
            mesh = update.device_mesh
            copies = DTensor.from_local(step, mesh, [Replicate()] * mesh.ndim, run_check=False)
            return copies.redistribute(placements=update.placements)  # each rank its rows: nothing travels
        return step
