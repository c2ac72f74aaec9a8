"""L_intra: which of an image's T query outputs is what the title speaks of?

Letters: B products of this rank, T queries, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.kernels.launch import autocast_off
from eclip.objectives.contrast import unit


def intra_product_loss(slots: Tensor, texts: Tensor, positive: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over the T outputs of each image: the positive one is what the title speaks of.

    slots (B, T, D), texts (B, D), positive (B,); excluded (B, T) bool: prompts of the same title or product.
    """
    with autocast_off(slots):
        logits = torch.einsum("btd,bd->bt", unit(slots), unit(texts))
        logits = (logits / temperature).masked_fill(excluded, float("-inf"))
        return F.cross_entropy(logits, positive)
