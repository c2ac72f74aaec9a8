"""The float64 result against the reference in float64."""

import functools
from typing import Any

import pytest
import torch

from benchmarks.contrastive.exact import exact_loss
from eclip.kernels.contrastive import contrastive_loss_reference
from tests.benchmarks.contrastive.problem import IDS, B, problem, value_and_gradients


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_exact_loss_is_the_reference_in_float64(positives: Any, sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.contrastive.exact.BLOCK", 7 * B)
    image, text, scale = problem(100.0)
    ids = None if positives == "diagonal" else IDS
    sample = torch.tensor([0, 5, 23])
    found = exact_loss(image, text, scale.item(), sample, ids=ids, positives=positives, both=sides == "both")
    options = {} if ids is None else {"image_ids": ids}
    reference = functools.partial(contrastive_loss_reference, positives=positives, sides=sides, **options)
    value, grad_image, grad_text, grad_scale = value_and_gradients(reference, image, text, scale)
    torch.testing.assert_close(found.loss, value)
    torch.testing.assert_close(found.image, grad_image[sample])
    torch.testing.assert_close(found.scale, grad_scale)
    if sides == "both":
        torch.testing.assert_close(found.text, grad_text[sample])
