"""The image-text contrastive loss of a whole split as one batch: what pretraining minimises, on what it has not seen.

Images with the same title share their target (e-CLIP's label matrix). Retrieval counts ranks; this also sees how
confident the scores are, at the temperature that the run has learnt.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.features import Features
from eclip.evaluate.report.tables import Table
from eclip.kernels.contrastive import contrastive_loss


def run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]:
    yield "image_text_loss", image_text_loss(split.features, evaluator.model.scale())


@torch.no_grad()
def image_text_loss(features: Features, scale: Tensor) -> Table | str:
    """Mean of both directions over all n images and their titles; computed on the device of `scale`.

    Rows as in image_text_retrieval. Chance is the loss of scores that are all equal, ln n. Returns a table, or the
    reason why there is none.
    """
    if not scale.isfinite().all():
        return f"the temperature that the run has learnt is not finite (scale {scale.item()})"
    text, titles = features.text.to(scale.device), torch.from_numpy(features.titles).to(scale.device)
    losses = {
        name: contrastive_loss(image.to(scale.device), text, scale, image_ids=titles, positives="soft").item()
        for name, image in features.image_embeddings().items()
    }
    losses["chance"] = math.log(len(features))
    return Table(
        title="image-text loss, the split as one batch",
        rows={name: {"nats": loss} for name, loss in losses.items()},
        counts={"images": len(features)},
        unit="nats",
    )
