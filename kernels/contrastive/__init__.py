"""Contrastive losses of large batches whose matrix of logits is never in memory."""

from .loss import contrastive_loss, contrastive_loss_reference
from .sigmoid import sigmoid_loss, sigmoid_loss_reference

__all__ = ["contrastive_loss", "contrastive_loss_reference", "sigmoid_loss", "sigmoid_loss_reference"]
