"""The contrastive loss, forward and forward with backward, against the reference that builds the B x B matrix.

Counted: FLOPs as multiples of u = 2 B^2 D, 1u forward and 4u with backward (logits again, then one product a tower);
bytes as both towers read once, and read again with their gradients written once. Features are random unit vectors.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import PROVIDERS, provide
from eclip.kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference

SIZES = ("small", "middle", "large")
# torch.compile at one size alone: each shape costs it 10 s.
CELLS = [(size, name) for size in SIZES for name in PROVIDERS if name != "compile" or size == "large"]


def pick_features(bench: Any, size: str) -> tuple[Tensor, Tensor, str]:
    """Normalised image and text features (B, D) of a named size, and its description."""
    position = SIZES.index(size)
    batch, dim = bench.pick(gpu=((4096, 16384, 32768)[position], 512), cpu=((64, 256, 512)[position], 64))
    image, text = (bench.randn(batch, dim, dtype=torch.float32, seed=seed) for seed in (0, 1))
    image, text = (F.normalize(x, dim=-1).to(bench.dtype) for x in (image, text))
    return image, text, f"B={batch} D={dim}"


@pytest.mark.parametrize("size, provider", CELLS)
def test_forward(bench: Any, size: str, provider: str) -> None:
    image, text, shape = pick_features(bench, size)
    scale = torch.tensor(50.0, device=bench.device)
    loss = provide(provider, ours=contrastive_loss, reference=contrastive_loss_reference)
    bench(
        lambda: loss(image, text, scale),
        op="contrastive_loss forward",
        provider=provider,
        shape=shape,
        bytes=image.nbytes + text.nbytes,
        flops=2 * len(image) ** 2 * image.shape[1],
    )


@pytest.mark.parametrize("positives", ["diagonal", "soft"])
@pytest.mark.parametrize("size, provider", CELLS)
def test_forward_backward(bench: Any, size: str, positives: str, provider: str) -> None:
    image, text, shape = pick_features(bench, size)
    scale = torch.tensor(50.0, device=bench.device)
    loss = provide(provider, ours=contrastive_loss, reference=contrastive_loss_reference)
    # Two rows in three share their id with another: catalogue entries of a batch.
    ids = {} if positives == "diagonal" else {"image_ids": torch.arange(len(image), device=bench.device) * 2 // 3}
    bench(
        bench.backward(lambda i, t, s: loss(i, t, s, positives=positives, **ids), image, text, scale),
        op=f"contrastive_loss forward+backward, {positives}",
        provider=provider,
        shape=shape,
        bytes=3 * (image.nbytes + text.nbytes),
        flops=4 * 2 * len(image) ** 2 * image.shape[1],
    )
