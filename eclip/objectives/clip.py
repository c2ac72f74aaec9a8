"""CLIP (arXiv 2103.00020): L_itc alone, on view a. The baseline."""

import torch.distributed as dist
from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP
from eclip.objectives.contrast import image_text_loss, unit
from eclip.objectives.objective import Encoded, Local, Objective
from eclip.objectives.views import CachedFeatures, encode_view


class ClipObjective(Objective):
    """Towers and projections learn; the decoder, its queries and the matching head stay as they began."""

    views = 1
    needs_momentum = False
    trains_decoder = False

    def lock_unused(self, model: ECLIP) -> None:
        for part in (model.queries, model.instance_decoder, model.matching_head):
            part.requires_grad_(False)

    def weights(self, step: int) -> dict[str, float]:
        return {"itc": self.config.itc_weight}

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
        own = encode_view(model, batch, cached, 0, token_keep=self.config.token_keep, step=step, seed=seed)
        return Encoded(views=(own,), pairs={"image": unit(own.image.cls), "text": unit(own.text)}, pool={})

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
        return Local(losses={}, pairs={})

    def pair_losses(
        self, model: ECLIP, pairs: dict[str, Tensor], batch: Batch, *, group: dist.ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        return {"itc": image_text_loss(model, pairs["image"], pairs["text"], batch, self.config, group)}
