"""What takes the model once more: hits put in order with the matching head, words found in the pictures of hits.

Letters: n rows, D embedding width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eclip.dataloading.schema import Box
from eclip.inference import Region, TrainedModel, read_picture
from eclip.inference.encoding import IMAGE, TEXT
from eclip.inference.trained import Vectors
from eclip.search.embed.schema import INSTANCE_TITLE
from eclip.search.query.asking import MARGIN, regions_of

MATCHED = INSTANCE_TITLE
"""The matching head was trained on instances that were prompted by their own titles."""
_EPS = 1e-6


def match_scores(model: TrainedModel, words: Tensor, instances: Vectors, cosines: Vectors) -> Vectors:
    """(n,) scale * cosine + logit of the matching head, both as training has them.

    words: (D,) feature; instances: (n, D) stored vectors of MATCHED; cosines: (n,) of the first ranking. The head alone
    ranks worse than the cosines that it follows, and the sum no better (evaluate/README.md has the figures).
    """
    encoder = model.encoder
    rows = torch.from_numpy(np.ascontiguousarray(instances, dtype=np.float32))
    with torch.inference_mode():
        matched = torch.logit(encoder.match(rows, words.expand(len(rows), -1)).double().cpu(), eps=_EPS)
        scale = float(encoder.model.logit_scale.double().exp())
    return np.asarray(scale * cosines + matched.numpy(), dtype=np.float32)


def find_words(model: TrainedModel, words: Tensor, rows: Sequence[dict[str, Any]]) -> list[Box]:
    """Where the words (D,) are in the thumbnail of each row, in pixels of the row's width and height."""
    encoded = model.encode([row["thumbnail"] for row in rows])
    maps = model.encoder.maps(encoded, words.expand(len(rows), -1), TEXT)
    scores = maps.float().cpu().numpy()
    return [regions_of(model, s, _whole(row), limit=1)[0].box for s, row in zip(scores, rows, strict=True)]


def locate_in(
    model: TrainedModel, row: dict[str, Any], prompt: Any, *, box: Box | None = None, limit: int = 5
) -> list[Region]:
    """Regions of a row's thumbnail that show a text or an exemplar image, in pixels of the row's width and height."""
    if isinstance(prompt, str):
        features, modality = model.text_features(prompt), TEXT
    else:
        pixels = read_picture(prompt, model.encoder.image_size, box, margin=MARGIN)
        features, modality = model.encoder.images(pixels.square[None], [pixels.size]).features.cls, IMAGE
    maps = model.encoder.maps(model.encode([row["thumbnail"]]), features, modality)
    return regions_of(model, maps[0].float().cpu().numpy(), _whole(row), limit=limit)


def _whole(row: dict[str, Any]) -> Box:
    return 0.0, 0.0, float(row["width"]), float(row["height"])
