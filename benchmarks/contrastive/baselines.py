"""The contrastive loss as one writes it in PyTorch: B x B logits, a softmax each way.

Logits are in the features' dtype and softmaxes in float32, as training under autocast computes them:
`contrastive_loss_reference` is float32 throughout, and a bf16 kernel that beats it has beaten the dtype.

Letters: B pairs, D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _logits(image: Tensor, text: Tensor, scale: Any) -> Tensor:
    logits: Tensor = scale * image @ text.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def eager(image: Tensor, text: Tensor, scale: Any) -> Tensor:
    logits = _logits(image, text, scale)
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_soft(image: Tensor, text: Tensor, scale: Any, ids: Tensor) -> Tensor:
    """e-CLIP's label matrix: pairs of equal ids share a row's target mass."""
    logits = _logits(image, text, scale)
    same = (ids[:, None] == ids).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_fixed_keys(image: Tensor, text: Tensor, scale: Any, ids: Tensor) -> Tensor:
    """Images against fixed keys; other pairs of the same product count nowhere."""
    logits = _logits(image, text.detach(), scale)
    other = (ids[:, None] == ids).fill_diagonal_(False)
    return F.cross_entropy(logits.masked_fill(other, -torch.inf), torch.arange(len(image), device=image.device))
