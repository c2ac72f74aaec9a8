"""SigLIP's sigmoid loss against plain PyTorch, forward and backward, at SigLIP's initial scale and bias.

Features and counting are those of bench_contrastive_loss.py: 4u FLOP, u = 2 B^2 D. `eager` builds the B x B logits in
the features' dtype and takes the loss in float32. error: largest miss of the features' gradients at 256 rows against
float64, relative to the largest.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contrastive.bench_contrastive_loss import features, sampled_rows
from benchmarks.contrastive.goals import label
from benchmarks.harness.bench import Bench
from benchmarks.harness.providers import PROVIDERS, provide
from eclip.kernels.contrastive import sigmoid_loss

SCALE, BIAS = 10.0, -10.0


def eager(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = (scale * image @ text.T + bias).float()
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(image)


def exact_gradients(image: Tensor, text: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the images and of the texts `rows`, in float64."""
    image, text = image.double(), text.double()

    def side(own: Tensor, other: Tensor) -> Tensor:
        weights = torch.sigmoid(SCALE * own[rows] @ other.T + BIAS)
        weights[torch.arange(len(rows)), rows] -= 1
        return weights @ other * (SCALE / len(own))

    return side(image, text), side(text, image)


# torch.compile at one size alone: each costs it 10 to 40 s.
CELLS = [(size, name) for size in ("4k", "32k") for name in PROVIDERS if name != "compile" or size == "32k"]


@pytest.mark.parametrize("size, provider", CELLS)
def test_forward_backward(bench: Bench, size: str, provider: str) -> None:
    image, text = features(size, 512)
    loss = provide(provider, ours=sigmoid_loss, reference=eager)
    scale, bias = (torch.tensor(x, device=bench.device) for x in (SCALE, BIAS))
    one = torch.ones((), device=bench.device)
    found = bench(
        bench.backward(loss, image, text, scale, bias, seeds=[one]),
        op="sigmoid_loss forward+backward",
        provider=provider,
        shape=label(len(image), image.shape[1], SCALE),
        bytes=3 * (image.nbytes + text.nbytes),
        flops=8 * len(image) ** 2 * image.shape[1],
    )
    rows = sampled_rows(len(image))
    errors = {
        name: float((value[rows].double() - want).abs().max() / want.abs().max())
        for name, value, want in zip(("image", "text"), found, exact_gradients(image, text, rows), strict=False)
    }
    bench.note(error=max(errors.values()), errors=errors)
