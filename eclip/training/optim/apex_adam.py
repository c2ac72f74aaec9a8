"""NVIDIA apex's FusedAdam: one launch for many parameters. It knows no DTensor, so it gets a rank's own shards."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from eclip.parallel.sharding import local_part

EPS = 1e-8


def find_fused_adam() -> type[torch.optim.Optimizer]:
    """apex.optimizers.FusedAdam. Raises ValueError where it is not installed, or is another package of that name."""
    try:
        from apex.optimizers import FusedAdam
    except Exception as error:  # a stranger's package may fail in any way
        raise ValueError(
            f"--optimizer apex_adam: there is no NVIDIA apex here ({type(error).__name__}: {_line(error)}); build it "
            f"from NVIDIA's source with its CUDA extensions (the package named apex on the index is another thing), or "
            f"use --optimizer adamw"
        ) from error
    if not (isinstance(FusedAdam, type) and issubclass(FusedAdam, torch.optim.Optimizer)):
        raise ValueError(
            "--optimizer apex_adam: apex.optimizers.FusedAdam here is no optimizer of PyTorch's; build apex from "
            "NVIDIA's source, or use --optimizer adamw"
        )
    return FusedAdam


def check_apex() -> None:
    """Take a step of FusedAdam. Raises ValueError where that does not work: no apex, no CUDA extensions, no GPU."""
    fused_adam = find_fused_adam()
    parameter = nn.Parameter(torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu"))
    parameter.grad = torch.ones_like(parameter)
    try:
        fused_adam([parameter], lr=0.5, adam_w_mode=True).step()  # type: ignore[call-arg]
    except Exception as error:
        raise ValueError(
            f"--optimizer apex_adam: apex's FusedAdam does not work here ({_line(error)}); build apex from NVIDIA's "
            f"source with its CUDA extensions, on a machine with a GPU, or use --optimizer adamw"
        ) from error


class ApexAdam(torch.optim.Optimizer):
    """AdamW by apex, for parameters that are plain or sharded (FSDP2).

    FusedAdam sees plain tensors that share their storage with the shards. `state` is AdamW's, keyed by the real
    parameters: a step counter each, and moments that are sharded alike, so that either may continue the other.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": EPS})
        self._fused_adam = find_fused_adam()
        self._views: dict[Tensor, nn.Parameter] = {}
        self._inner: torch.optim.Optimizer | None = None
        self._members: list[list[Tensor]] = []

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step."""
        parts = [part for group in self.param_groups for part in self._parts(group)]
        members = [found for _, found, _ in parts]
        if self._inner is None or not _same(members, self._members):
            # FusedAdam must be given its groups when it is made; they change when a parameter has no gradient.
            views = [{"params": [self._view(p) for p in found]} for found in members]
            self._inner = self._fused_adam(views, adam_w_mode=True) if views else None  # type: ignore[call-arg]
            self._members = members
        if self._inner is None:
            return
        for inner, (group, found, count) in zip(self._inner.param_groups, parts, strict=True):
            inner.update({key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}, step=count)
            for parameter in found:
                view, state = self._view(parameter), self.state[parameter]
                view.data, view.grad = local_part(parameter), local_part(cast(Tensor, parameter.grad))
                self._inner.state[view] = {key: local_part(state[key]) for key in ("exp_avg", "exp_avg_sq")}
        self._inner.step()
        for view in self._views.values():
            view.grad = None

    def _parts(self, group: dict[str, Any]) -> list[tuple[dict[str, Any], list[Tensor], int]]:
        """The parameters of a group that have gradients, by the steps they have taken: FusedAdam counts by group."""
        by_count: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(self.fresh_state(parameter))
            # An empty shard at the end of a list would keep apex from launching what stands before it.
            if local_part(parameter).numel():
                by_count.setdefault(int(state["step"]), []).append(parameter)
            state["step"] += 1
        return [(group, found, count) for count, found in by_count.items()]

    def _view(self, parameter: Tensor) -> nn.Parameter:
        if parameter not in self._views:
            self._views[parameter] = nn.Parameter(local_part(parameter))
        return self._views[parameter]


def _same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return [[id(p) for p in group] for group in a] == [[id(p) for p in group] for group in b]


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
