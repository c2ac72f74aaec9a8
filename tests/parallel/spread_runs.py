"""A small ECLIP in training, spread over ranks in one of three ways, and its whole state."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eclip.config import OptimConfig
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.parallel.settings import ComputeConfig
from eclip.parallel.sharding import spread
from eclip.presets import PRESETS
from eclip.training.momentum import make_momentum, update_momentum
from eclip.training.optim import build_optimizer

Way = Literal["none", "full", "hybrid"]
WAYS: tuple[Way, ...] = get_args(Way)


class _Root(nn.Module):
    def __init__(self, model: ECLIP, momentum: ECLIP) -> None:
        super().__init__()
        self.model, self.momentum = model, momentum

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            target = self.momentum.encode_image(images).cls
        features = self.model.encode_image(images)
        return {"loss": (features.cls - target.flip(0)).square().mean() * self.model.scale()}


class Run:
    """The text tower is locked and all but the image's has no gradient, as in runs without some of the losses."""

    def __init__(self, seed: int, ranks: Ranks, way: Way) -> None:
        torch.manual_seed(seed)
        self.rank = ranks.rank
        self.model = ECLIP(PRESETS["debug"].model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("image") or name == "logit_scale")
        self.momentum = make_momentum(self.model)
        self.module = spread(_Root(self.model, self.momentum), ranks, ComputeConfig(shard=way))
        self.optimizer = build_optimizer(self.model, OptimConfig())

    def train(self, steps: int) -> None:
        """Steps on images of the rank's own."""
        size = self.model.config.image_size
        numbers = torch.Generator().manual_seed(self.rank)
        for _ in range(steps):
            self.module(torch.randn(2, 3, size, size, generator=numbers))["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            update_momentum(self.model, self.momentum, 0.9)


def everything(run: Run) -> dict[str, Tensor]:
    """Every tensor of model, momentum model and optimizer, whole; every rank must call it."""
    models = {"model": run.model, "momentum": run.momentum}
    found = {f"{part}.{name}": value for part, model in models.items() for name, value in model.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        found |= {f"optimizer.{name}.{key}": v for key, v in run.optimizer.state.get(parameter, {}).items()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for name, v in found.items()}
