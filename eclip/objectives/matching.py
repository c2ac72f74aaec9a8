"""L_itm: does this title belong to this instance? Binary matching, with a hard title of the batch as the mismatch.

Letters: B products of this rank or micro-batch, G of the global batch, T queries, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.kernels.launch import autocast_off
from eclip.model.eclip import ECLIP
from eclip.objectives.contrast import unit
from eclip.objectives.draws import PromptDraw, take_query


def matching_loss(
    model: ECLIP, instances: Tensor, texts: Tensor, pool: Tensor, draw: PromptDraw, excluded: Tensor
) -> Tensor:
    """Instance (B, D) with its title (B, D), and with one of its T-1 negative titles out of `pool` (G, D).

    That one is drawn in proportion to exp(scale * cosine): the more alike, the more often. excluded (B, T) bool: titles
    that are no negatives; a row with all of them excluded counts its match alone.
    """
    with autocast_off(instances):
        own_instance, own_title, others = (unit(x) for x in (instances, texts, pool))
        candidates = others[draw.products]
        with torch.no_grad():
            similarity = model.scale().detach() * torch.einsum("bd,btd->bt", own_instance, candidates)
            similarity.scatter_(1, draw.positive[:, None], float("-inf")).masked_fill_(excluded, float("-inf"))
            chosen = (similarity + draw.gumbel).argmax(dim=1)
            usable = similarity.isfinite().any(dim=1)
        # Unit vectors times sqrt(D): entries of the product are of order one, as a linear head wants them.
        width = own_instance.shape[-1]
        matched = model.match(own_instance * own_title * width)
        unmatched = model.match(own_instance * take_query(candidates, chosen) * width)
        target = torch.ones(len(instances), dtype=torch.long, device=instances.device)
        positive_loss = F.cross_entropy(matched, target)
        negative_loss = F.cross_entropy(unmatched, target - 1, reduction="none")
        return (positive_loss + (negative_loss * usable).mean()) / 2
