"""One step's forward passes as one module, so that FSDP and DDP see every use of a parameter.

A step on a whole batch is one stage, "losses". A step on micro-batches takes the stages "encode" and "targets" of all
of them without gradient, then "rows" of each with it; accumulation.py is their order.

Letters: B products of a part (a rank's share of the batch, or a micro-batch of it).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eclip.config import RunConfig
from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP
from eclip.objectives.draws import Draws
from eclip.objectives.objective import make_objective
from eclip.objectives.views import CachedFeatures, View
from eclip.parallel.ranks import Ranks
from eclip.training.metrics.flops import overhead
from eclip.training.metrics.spans import span
from eclip.training.momentum import keep_locked_in_eval
from eclip.training.validation import validation_loss


@dataclass(frozen=True)
class Part:
    """What a forward pass of the step takes."""

    batch: Batch
    cached: CachedFeatures | None
    draws: Draws


@dataclass(frozen=True)
class EncodedPart:
    """What is kept of a part between the passes; no gradient."""

    pairs: dict[str, Tensor]
    """Unit vectors (B, D)."""
    pool: dict[str, Tensor]
    """(B, ...)."""
    other: View | None
    """View b by the momentum model, patch tokens and all, so that its towers run once."""
    scale: Tensor
    """The model's logit scale."""


class TrainStep(nn.Module):
    """Forward of a step. The root that FSDP shards: models are used inside `forward` only."""

    def __init__(self, model: ECLIP, momentum: ECLIP | None, config: RunConfig, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.momentum, self.group = model, momentum, ranks.group
        self.objective = make_objective(config.objective)
        self.bf16 = use_bf16(config, ranks)

    def forward(self, stage: str, *inputs: Any, **options: Any) -> Any:
        """Run a stage, a method of that name."""
        with span(stage), self.autocast():
            return getattr(self, stage)(*inputs, **options)

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 for what computes fast in it, on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.bf16 else nullcontext()

    def losses(self, part: Part, *, observe: bool = False) -> dict[str, Tensor]:
        """The whole step: "loss", every term and the logit scale, scalars. observe: further numbers for the log."""
        losses = self.objective.losses(
            self.model,
            self.momentum,
            part.batch,
            part.draws,
            cached=part.cached,
            group=self.group,
            observe=observe,
        )
        return {**losses, "logit_scale": self.model.scale().detach()}

    @torch.no_grad()
    def encode(self, part: Part) -> EncodedPart:
        """The rows of a part, each on its own."""
        with overhead():  # `rows` does it again
            view = self.objective.encode(self.model, part.batch, part.cached, part.draws)
        other = None
        if self.momentum is not None:
            other = self.objective.encode_momentum(self.momentum, part.batch, part.cached, part.draws)
        # A CLS feature is a slice of all tokens' and would keep them alive.
        pool = {name: x.contiguous() for name, x in self.objective.pool(view, other, part.batch).items()}
        return EncodedPart(self.objective.pairs(view), pool, other, self.model.scale())

    @torch.no_grad()
    def targets(self, part: Part, other: View | None, pool: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the part's rows are compared with; pool: of all rows of all ranks."""
        return self.objective.targets(self.momentum, other, pool, part.draws)

    def rows(
        self,
        part: Part,
        pool: dict[str, Tensor],
        targets: dict[str, Tensor],
        gradients: dict[str, Tensor],
        scale_gradient: Tensor,
        share: float,
        *,
        observe: bool = False,
    ) -> dict[str, Tensor]:
        """A part with gradient: its local losses, and "total", whose gradient is the part's of the whole step.

        pool, targets: of all rows of all ranks. gradients: of the pair losses, in the part's `pairs`; scale_gradient:
        in the logit scale. share: of the part in the rank's rows.
        """
        model, objective = self.model, self.objective
        view = objective.encode(model, part.batch, part.cached, part.draws)
        pairs = objective.pairs(view)
        local = objective.local_losses(model, part.batch, view, pool, targets, part.draws, observe=observe)
        # The scale enters every part, and every backward pass then reaches the same parameters on all ranks.
        total = share * scale_gradient * model.scale()
        for name, rows in pairs.items():
            total = total + (rows * gradients[name]).sum()
        if local:
            total = total + share * objective.weighted_sum(local, part.batch.step)
        return {**local, "total": total}

    @torch.no_grad()
    def validate(self, batch: Batch) -> Tensor:
        """The loss of a batch of the val split, on this rank alone."""
        return validation_loss(self.model, batch, self.objective.config)

    def train(self, mode: bool = True) -> "TrainStep":
        """Locked parts and the momentum model stay in eval mode."""
        super().train(mode)
        if self.momentum is not None:
            self.momentum.eval()
        keep_locked_in_eval(self.model)
        return self


def use_bf16(config: RunConfig, ranks: Ranks) -> bool:
    return config.bf16 and ranks.device.type == "cuda"
