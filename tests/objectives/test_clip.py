"""The baseline."""

import torch

from eclip.model.eclip import ECLIP
from eclip.objectives.settings import ObjectiveConfig
from tests.objectives.batches import compute_losses, make_batch


def test_clip_is_itc_alone_and_equals_eclips_itc(model: ECLIP) -> None:
    losses = compute_losses(model, make_batch(), ObjectiveConfig(objective="clip"), step=0, seed=0)
    assert set(losses) == {"loss", "itc"}
    torch.testing.assert_close(losses["itc"], compute_losses(model, make_batch())["itc"])
