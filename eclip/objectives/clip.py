"""CLIP (arXiv 2103.00020): L_itc alone, on view a. The baseline."""

from eclip.model.eclip import ECLIP
from eclip.objectives.objective import Objective


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
