"""The seam between an objective and the rest: what training asks of it, and what evaluation reads out of its model.

Training: `check_batch` before anything is built, `lock_unused` on a new model, a momentum model if `needs_momentum`,
then `draw` and `losses` of a batch each step. Evaluation: `embed` of images and titles, `trains_decoder` for what to
expect of it. The trainer hands over the momentum model and moves it after a step; an objective holds settings and no
state.

`losses` is composed of stages, so that a batch can also be taken in micro-batches (training/accumulation.py); its
gradients are those of the whole batch:

    encode, encode_momentum  views of rows, each on its own
    pool                     what other rows may be prompted with: gathered from all rows, carries no gradient
    targets                  given the pool, what rows are to be compared with: gathered too, carries no gradient
    local_losses             given pool and targets, the losses that are means over rows
    pairs, pair_losses       the losses that couple rows; their gradient goes back through `pairs` alone

A loss of the batch is the mean over micro-batches of a local loss, and a pair loss itself. An objective with another
coupling sets `splits` to False, and training says at the start that it takes no --micro-batch.

A new objective: a file beside clip.py with a subclass, its name in `ObjectiveConfig.objective`, a line in
`make_objective`.

Letters: B rows (products) of a rank or micro-batch, G of the global batch, N patch tokens, D width.
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
from eclip.model.settings import ModelConfig
from eclip.objectives.contrast import Labels, image_text_loss, unit
from eclip.objectives.draws import Draws, draw_tokens
from eclip.objectives.settings import ObjectiveConfig
from eclip.objectives.views import CachedFeatures, View, encode_view
from eclip.parallel.gather import gather_rows


@dataclass(frozen=True)
class Objective(ABC):
    """What a model learns from. See the module's docstring."""

    config: ObjectiveConfig

    views: ClassVar[Literal[1, 2]]
    """Views of a product that a batch must show."""
    text: ClassVar[Literal["pooled", "tokens"]] = "pooled"
    """Which output of the text tower it reads; `encode_view` gives the pooled one alone so far."""
    needs_momentum: ClassVar[bool]
    """Whether a momentum model stands beside the model, and encodes view b."""
    splits: ClassVar[bool] = True
    """Whether its stages give the gradients of a whole batch from micro-batches."""

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

    def draw(self, total: int, rows: range, model: ModelConfig, *, step: int, seed: int) -> Draws:
        """The random numbers of `rows` of a step's global batch of `total` rows, on the CPU."""
        return Draws(rows.start, draw_tokens(model.grid**2, self.config.token_keep, seed=seed, step=step))

    def encode(self, model: ECLIP, batch: Batch, cached: CachedFeatures | None, draws: Draws) -> View:
        """View a; `cached` replaces towers."""
        return encode_view(model, batch, cached, 0, draws.kept)

    @torch.no_grad()
    def encode_momentum(self, momentum: ECLIP, batch: Batch, cached: CachedFeatures | None, draws: Draws) -> View:
        """View b by the momentum model."""
        return encode_view(momentum, batch, cached, 1, draws.kept)

    def pairs(self, view: View) -> dict[str, Tensor]:
        """Unit vectors (B, D) by name, for `pair_losses`."""
        return {"image": unit(view.image.cls), "text": unit(view.text)}

    def pool(self, view: View, other: View | None, batch: Batch) -> dict[str, Tensor]:
        """(B, ...) by name: what the further stages want of all rows. other: view b, with `needs_momentum`."""
        return {}

    def targets(
        self, momentum: ECLIP | None, other: View | None, pool: dict[str, Tensor], draws: Draws
    ) -> dict[str, Tensor]:
        """(B, ...) by name: what `local_losses` compares rows with, given the `pool` of all G rows."""
        return {}

    def local_losses(
        self,
        model: ECLIP,
        batch: Batch,
        view: View,
        pool: dict[str, Tensor],
        targets: dict[str, Tensor],
        draws: Draws,
        *,
        observe: bool = False,
    ) -> dict[str, Tensor]:
        """Scalars by name, means over the rows of `batch`; `pool` and `targets` are those of all G rows.

        observe: also give numbers for the log that no weight is for.
        """
        return {}

    def pair_losses(
        self,
        pairs: dict[str, Tensor],
        batch: Labels,
        *,
        scale: Tensor,
        kernels: str,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, Tensor]:
        """`pairs` of all rows of this rank, compared with all ranks'. scale, kernels: the model's.

        Rows of other ranks must be fetched here, with their gradients (`contrast` does), and the mean over ranks of
        what is returned must be the loss of the global batch.
        """
        images, texts = pairs["image"], pairs["text"]
        return {"itc": image_text_loss(images, texts, batch, self.config, scale=scale, kernels=kernels, group=group)}

    def losses(
        self,
        model: ECLIP,
        momentum: ECLIP | None,
        batch: Batch,
        draws: Draws,
        *,
        cached: CachedFeatures | None = None,
        group: dist.ProcessGroup | None = None,
        observe: bool = False,
    ) -> dict[str, Tensor]:
        """All losses of one step: "loss" (the weighted sum) and each term by name, scalars.

        float32, or float64 of a float64 model. Every loss is this rank's share; their mean over ranks is exact.
        momentum may be None without `needs_momentum`.
        """
        view = self.encode(model, batch, cached, draws)
        pairs = self.pairs(view)
        other = None
        if self.needs_momentum:
            assert momentum is not None, "this objective needs the momentum model"
            other = self.encode_momentum(momentum, batch, cached, draws)
        pool = {name: gather_rows(rows, group) for name, rows in self.pool(view, other, batch).items()}
        found = self.targets(momentum, other, pool, draws)
        targets = {name: gather_rows(rows, group) for name, rows in found.items()}
        local = self.local_losses(model, batch, view, pool, targets, draws, observe=observe)
        coupled = self.pair_losses(pairs, batch, scale=model.scale(), kernels=model.config.kernels, group=group)
        return self.in_order({**coupled, **local}, batch.step)

    def in_order(self, losses: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Losses in the order of `weights`, then "loss", then what has no weight."""
        weights = self.weights(step)
        ordered = {name: losses[name] for name in weights}
        rest = {name: value for name, value in losses.items() if name not in weights}
        return {**ordered, "loss": self.weighted_sum(losses, step), **rest}

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
