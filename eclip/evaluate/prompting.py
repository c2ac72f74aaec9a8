"""The instance decoder and the matching head, asked one by one: which prompt, which pair.

Letters: B images, N patch tokens, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.model.eclip import ECLIP
from eclip.model.instance_decoder import TEXT
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig

_ALL_STEPS = 10**9
"""A step at which every ramp of a weight is over."""


def trains_head(config: ObjectiveConfig) -> bool:
    """Whether a run of these settings teaches the matching head something."""
    objective = make_objective(config)
    return objective.trains_decoder and objective.weights(_ALL_STEPS).get("itm", 0) > 0


@torch.inference_mode()
def decode_by_text(model: ECLIP, tokens: Tensor, text: Tensor) -> Tensor:
    """Instance embeddings, each image prompted by a text of its own.

    tokens: (B, N, D) projected patch tokens; text: (B, D), of any length. Returns unit vectors (B, D), float32.
    """
    output = model.decode_queries(tokens, model.instance_queries(text, TEXT))
    return F.normalize(output.slots[:, 0].float(), dim=-1)  # slot 0 is the positive query


@torch.inference_mode()
def match_odds(model: ECLIP, instances: Tensor, texts: Tensor, *, device: torch.device) -> Tensor:
    """The matching head's log odds that instance and text belong together, fed as in training (`matching_loss`).

    instances, texts: unit vectors (B, D), or one (D,) against all of the other. Returns (B,) float32 on the CPU.
    """
    logits = model.match(instances.to(device) * texts.to(device) * instances.shape[-1]).float()
    return (logits[:, 1] - logits[:, 0]).cpu()
