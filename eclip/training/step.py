"""One step's forward pass as one module, so that FSDP sees one forward and one backward."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from eclip.config import RunConfig
from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.objectives.views import CachedFeatures
from eclip.parallel.ranks import Ranks
from eclip.training.momentum import is_locked


class TrainStep(nn.Module):
    """Forward of one step: a batch to its losses. The root that FSDP shards: models are used inside `forward` only."""

    def __init__(self, model: ECLIP, momentum: ECLIP | None, config: RunConfig, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.momentum, self.group, self.seed = model, momentum, ranks.group, config.seed
        self.objective = make_objective(config.objective)
        self.autocast = use_bf16(config, ranks)

    def forward(self, batch: Batch, features: CachedFeatures | None) -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            losses = self.objective.losses(
                self.model,
                self.momentum,
                batch,
                features=features,
                step=batch.step,
                seed=self.seed,
                group=self.group,
            )
        return {**losses, "logit_scale": self.model.scale().detach()}

    def train(self, mode: bool = True) -> "TrainStep":
        """Locked parts and the momentum model stay in eval mode."""
        super().train(mode)
        if self.momentum is not None:
            self.momentum.eval()
        for child in self.model.children():
            if is_locked(child):
                child.eval()
        return self


def use_bf16(config: RunConfig, ranks: Ranks) -> bool:
    return config.bf16 and ranks.device.type == "cuda"
