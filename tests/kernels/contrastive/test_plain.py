"""The contrastive loss in PyTorch, a tile of logits at a time: several tiles, ids, memory."""

from typing import Any

import pytest
import torch

from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference, plain
from tests.kernels.contrastive.checks import check_contrastive, make_arguments, peak_bytes, value_and_grads


def test_several_tiles_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_TILE", 32)
    for positives in ("soft", "mask"):
        check_contrastive(make_arguments(135, 16, positives, bias=True))


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch, positives: str) -> None:
    """Twice the batch, twice the memory of value and gradients; the reference takes four times as much."""
    monkeypatch.setattr(plain, "_TILE", 128)  # 64 KiB, an eighth of the smaller batch's image gradient

    def peak(loss: Any, batch: int) -> int:
        arguments = make_arguments(batch, 128, positives)
        return peak_bytes(lambda: value_and_grads(loss, arguments))

    small, large = (peak(contrastive_loss, batch) for batch in (1024, 2048))
    assert 1.5 * small < large <= 2.1 * small
    assert peak(contrastive_loss_reference, 1024) > 3.5 * peak(contrastive_loss_reference, 512)


def test_plain_tiles_compare_ids_by_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose id no column has, and columns whose id no row has, match nothing."""
    monkeypatch.setattr(plain, "_TILE", 4)
    image, text = torch.randn(2, 6, 8)
    apart = {"image_ids": torch.arange(6), "text_ids": torch.arange(6) + 100}
    for positives in ("soft", "mask"):
        found = contrastive_loss(image, text, 2.0, positives=positives, **apart)
        torch.testing.assert_close(found, contrastive_loss(image, text, 2.0))
