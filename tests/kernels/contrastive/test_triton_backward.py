"""The Triton backward of the contrastive losses: blocks of the logits' gradient, from features or from what was kept.

On the paths that launch kernels, interpreted and on a GPU.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference, triton_backward
from eclip.kernels.contrastive.options import keeps_logits, padded_shape
from eclip.kernels.contrastive.problem import Logits
from tests.kernels.contrastive.checks import (
    check_contrastive,
    exact_gradients,
    gradients,
    make_arguments,
    on,
    opposed,
    value_and_grads,
    with_features,
)


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_kept_logits_give_the_same_gradients(device: torch.device, tiny: None, positives: str, sides: str) -> None:
    arguments = make_arguments(100, 16, positives, scale=100.0, keys=100 if sides == "both" else 120, bias=True)
    arguments = {**on(device, with_features(arguments, torch.bfloat16)), "sides": sides}
    assert keeps_logits(arguments["image_features"], 120, sides, 2**16)
    for keep_bytes in (0, 2**16):
        check_contrastive(arguments, keep_bytes=keep_bytes, roundings=2 if keep_bytes else 1)


def test_kept_logits_that_underflow(device: torch.device) -> None:
    """What was kept is 0 everywhere: the backward computes logits again."""
    arguments = on(device, with_features(opposed(70, 24), torch.bfloat16))
    found, again = (value_and_grads(functools.partial(contrastive_loss, keep_bytes=k), arguments) for k in (2**20, 0))
    for name, value in again.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("shape", [(1, 1), (16384, 32768), (5, 2**30), (2**20, 2**20), (16385, 70000)])
def test_blocks_cover_the_matrix_within_the_budget(shape: tuple[int, int]) -> None:
    image, text = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in shape)
    blocks = triton_backward._blocks(image, text)
    for rows, cols in blocks:
        height, width = padded_shape(rows.stop - rows.start, cols.stop - cols.start)
        assert 2 * height * width <= max(triton_backward._BLOCK_BYTES, 2 * height * 256)
    covered = sum((rows.stop - rows.start) * (cols.stop - cols.start) for rows, cols in blocks)
    assert covered == shape[0] * shape[1]
    assert all(cols.start % 256 == 0 and rows.start % 128 == 0 for rows, cols in blocks)


def test_fp16_keeps_small_probabilities(device: torch.device) -> None:
    """Entries of G near 1e-7, where fp16 knows multiples of 6e-8. No row has its pair: that would hide them."""
    arguments = on(device, with_features(make_arguments(64, 64, scale=1.0), torch.float16))
    image, text, scale = (arguments[name] for name in ("image_features", "text_features", "logit_scale"))
    row_stat, none, shift = (torch.full((n,), x, device=device) for n, x in ((64, 16.0), (0, 0.0), (1, 0.0)))
    weights = (torch.ones(64, device=device), torch.zeros(64, device=device))
    logits = Logits(image, text, scale, None, None, None, *weights, shift, -64, "rows", "diagonal")
    # The factor lifts what is returned, in fp16, out of that range.
    found, exact = (take(logits, row_stat, none, 1024.0) for take in (gradients, exact_gradients))
    for ours, expected in zip(found[:3], exact[:3], strict=True):
        assert (ours - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("scale", [50.0, 100.0])
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_gradients_are_better_than_from_half_precision_logits(
    device: torch.device, scale: float, keep_bytes: int
) -> None:
    """As training has them: pairs are alike and the loss is small. Half the error of logits in bf16 at most, in rms."""
    arguments = make_arguments(128, 128, scale=scale)
    image, text = arguments["image_features"], arguments["text_features"]
    arguments["text_features"] = F.normalize(0.5 * image + text, dim=-1)
    arguments = on(device, with_features(arguments, torch.bfloat16))
    exact = value_and_grads(contrastive_loss_reference, arguments, torch.float64)
    ours = value_and_grads(functools.partial(contrastive_loss, keep_bytes=keep_bytes), arguments)
    rough = value_and_grads(half_precision_logits, arguments)
    for name in ("image_features", "text_features"):
        error, allowed = ((found[name] - exact[name]).square().mean().sqrt() for found in (ours, rough))
        assert error <= allowed / 2, f"{name}: {error:.2e}, half-precision logits {allowed:.2e}"


def half_precision_logits(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor, positives: str
) -> torch.Tensor:
    """The usual few lines: a product rounded to bf16, the rest in fp32."""
    logits = logit_scale * (image_features @ text_features.T).float()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
