"""L_intra against its formula."""

import torch
import torch.nn.functional as F

from eclip.objectives.intra_product import intra_product_loss
from tests.objectives.batches import B, T


def test_intra_product_loss_against_its_formula() -> None:
    slots, texts, positive = torch.randn(B, T, 6), torch.randn(B, 6), torch.randint(T, (B,))
    excluded = torch.rand(B, T) < 0.3
    excluded[torch.arange(B), positive] = False
    expected = 0.0
    for b in range(B):
        terms = [
            torch.exp(F.cosine_similarity(slots[b, t], texts[b], dim=0) / 0.2) for t in range(T) if not excluded[b, t]
        ]
        own = torch.exp(F.cosine_similarity(slots[b, positive[b]], texts[b], dim=0) / 0.2)
        expected -= torch.log(own / sum(terms)) / B
    torch.testing.assert_close(intra_product_loss(slots, texts, positive, excluded, 0.2), expected)
