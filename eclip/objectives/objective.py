"""The seam between an objective and the rest: what training asks of it, and what evaluation reads out of its model.

Training: `check_batch` before anything is built, `lock_unused` on a new model, a momentum model if `needs_momentum`,
then `losses` of a batch each step. Evaluation: `embed` of images and titles, `trains_decoder` for what to expect of it.
The trainer hands over the momentum model and moves it after a step; an objective holds settings and no state.

`losses` is made of three parts, so that a batch can also be taken in micro-batches (tests/objectives/micro_batches.py
does it; gradients are those of the whole batch):

    features(micro-batch)             encodes rows. `pairs` are unit vectors to be compared with all rows'; `pool` is
                                      what other rows may be prompted with, and carries no gradient
    local_losses(micro-batch, pool)   given the pool of all rows: the losses that couple no rows, and further `pairs`
    pair_losses(pairs of all rows)    the losses that couple rows; their gradient goes back through `pairs` alone

Micro-batch i of M draws its random numbers as rank i of M does. A loss of the batch is the mean over micro-batches of a
local loss, and a pair loss itself.

A new objective: a file beside clip.py with a subclass, its name in `ObjectiveConfig.objective`, a line in
`make_objective`.

Letters: B rows (products) of a batch or micro-batch, G of all ranks and micro-batches, N patch tokens, D width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.objectives.settings import ObjectiveConfig
from eclip.objectives.views import CachedFeatures, View
from eclip.parallel.gather import gather_rows


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What rows are without the others."""

    views: tuple[View, ...]
    """Views a, by the model, and where the objective reads two, b, by the momentum model."""
    pairs: dict[str, Tensor]
    """Unit vectors (B, D) by name, for `pair_losses`."""
    pool: dict[str, Tensor]
    """(B, ...) by name: what `local_losses` wants of all G rows."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """What rows are with the pool of all."""

    losses: dict[str, Tensor]
    """Scalars by name, means over the rows."""
    pairs: dict[str, Tensor]
    """Further unit vectors (B, D) by name, for `pair_losses`; those of the momentum model have no gradient."""


@dataclass(frozen=True)
class Objective(ABC):
    """What a model learns from. See the module's docstring."""

    config: ObjectiveConfig

    views: ClassVar[Literal[1, 2]]
    """Views of a product that a batch must show."""
    text: ClassVar[Literal["pooled", "tokens"]] = "pooled"
    """Which output of the text tower it reads; `encode_view` gives the pooled one alone so far."""
    needs_momentum: ClassVar[bool]
    """Whether a momentum model stands beside the model."""

    @property
    @abstractmethod
    def trains_decoder(self) -> bool:
        """Whether any of its losses teaches the instance decoder something."""

    def check_batch(self, global_batch_size: int, num_queries: int) -> None:  # noqa: B027 (most demand nothing)
        """Raise ValueError for a batch that it cannot use."""

    def lock_unused(self, model: ECLIP) -> None:  # noqa: B027 (most use the whole model)
        """Let the parts of a new model that it leaves alone require no gradient."""

    @abstractmethod
    def weights(self, step: int) -> dict[str, float]:
        """The weight of each loss at a step, in the order of the log."""

    @abstractmethod
    def features(
        self,
        model: ECLIP,
        momentum: ECLIP | None,
        batch: Batch,
        cached: CachedFeatures | None,
        *,
        step: int,
        seed: int,
    ) -> Encoded:
        """Encode the rows of a batch or micro-batch; `cached` replaces towers."""

    @abstractmethod
    def local_losses(
        self,
        model: ECLIP,
        momentum: ECLIP | None,
        batch: Batch,
        encoded: Encoded,
        pool: dict[str, Tensor],
        *,
        step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Local:
        """`encoded` rows of `batch`, which are rows [rank * B, (rank + 1) * B) of G = world_size * B in `pool`."""

    @abstractmethod
    def pair_losses(
        self, model: ECLIP, pairs: dict[str, Tensor], batch: Batch, *, group: dist.ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """`pairs` of all rows of this rank, compared with all ranks'; of `batch` only the ids are read."""

    def losses(
        self,
        model: ECLIP,
        momentum: ECLIP | None,
        batch: Batch,
        *,
        features: CachedFeatures | None = None,
        step: int,
        seed: int,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, Tensor]:
        """All losses of one step: "loss" (the weighted sum) and each term by name, scalars.

        float32, or float64 of a float64 model. Every loss is this rank's share; their mean over ranks is exact.
        momentum may be None without `needs_momentum`.
        """
        rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        encoded = self.features(model, momentum, batch, features, step=step, seed=seed)
        assert len(encoded.views) == self.views, f"{len(encoded.views)} views encoded, {self.views} declared"
        pool = {name: gather_rows(rows, group) for name, rows in encoded.pool.items()}
        local = self.local_losses(
            model, momentum, batch, encoded, pool, step=step, seed=seed, rank=rank, world_size=world_size
        )
        losses = self.pair_losses(model, encoded.pairs | local.pairs, batch, group=group) | local.losses
        return {**losses, "loss": self.weighted_sum(losses, step)}

    def weighted_sum(self, losses: dict[str, Tensor], step: int) -> Tensor:
        """Of the losses that are given."""
        terms = [weight * losses[name] for name, weight in self.weights(step).items() if name in losses]
        return sum(terms[1:], terms[0])

    def embed(self, model: ECLIP, image: ImageFeatures, text: Tensor) -> dict[str, Tensor]:
        """How images and their titles are embedded and located at inference.

        image: features of b images; text (b, D), not normalised. Returns unit vectors `global_image` and `text` (b, D),
        and `global_map` (b, N), the cosine of each patch token with the title. An objective that trains the decoder
        adds `instance_image` and `instance_text` (b, D), the instance embedding prompted by the image itself and by the
        title, and `instance_map` (b, N), the share of each patch token that the title's query takes from the others.
        """
        unit_text = F.normalize(text, dim=-1)
        return {
            "global_image": F.normalize(image.cls, dim=-1),
            "text": unit_text,
            "global_map": torch.einsum("bnd,bd->bn", F.normalize(image.tokens, dim=-1), unit_text),
        }


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the settings name."""
    # Imported here: their classes need the one above.
    from eclip.objectives.clip import ClipObjective
    from eclip.objectives.eclip import EclipObjective

    match config.objective:
        case "eclip":
            return EclipObjective(config)
        case "clip":
            return ClipObjective(config)
