"""Wrong arguments of `contrastive_loss`: a ValueError that names value and rule. `sigmoid_loss` shares the checks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.kernels.contrastive import contrastive_loss, sigmoid_loss

ONES = torch.ones(3, 4)
IDS = torch.arange(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": torch.ones(3, 5)}, r"\(3, 5\).*\(3, 4\)"),
        ({"image_features": torch.ones(4)}, r"\(4,\)"),
        ({"image_features": torch.ones(3, 0), "text_features": torch.ones(3, 0)}, "D >= 1"),
        ({"image_features": torch.ones(2, 4)}, "equally many rows"),
        ({"image_features": torch.ones(4, 4), "sides": "rows"}, "at least as many"),
        ({"image_features": torch.ones(0, 4), "text_features": torch.ones(0, 4)}, "no pair"),
        ({"image_features": ONES.half()}, "float16.*float32"),
        ({"image_features": IDS[:, None], "text_features": IDS[:, None]}, "floating dtype"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale \(2,\)"),
        ({"logit_scale": torch.tensor(3)}, "int64 must be one floating number"),
        ({"logit_scale": math.inf}, "logit_scale=inf is not finite"),
        ({"logit_scale": torch.tensor(math.nan)}, "logit_scale=nan is not finite"),
        ({"bias": torch.ones(4)}, r"bias \(4,\)"),
        ({"bias": IDS}, "bias.*int64"),
        ({"positives": "hard"}, "'hard'.*'diagonal', 'soft', 'mask', 'supcon'"),
        ({"sides": "columns"}, "'columns'"),
        ({"positives": "soft"}, "pass image_ids"),
        ({"positives": "soft", "text_ids": IDS}, "pass image_ids"),
        ({"image_ids": IDS}, "'diagonal' does not use ids"),
        ({"image_ids": IDS[:2], "positives": "mask"}, r"image_ids \(2,\)"),
        ({"image_ids": IDS, "text_ids": IDS.float(), "positives": "mask"}, "text_ids.*float32"),
        ({"image_ids": IDS == 1, "positives": "mask"}, "image_ids.*bool"),
        ({"text_features": ONES.to("meta")}, "image_features on cpu, text_features on meta"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], message: str) -> None:
    arguments = {"image_features": ONES, "text_features": ONES, "logit_scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
def test_no_check_breaks_a_graph_whose_sizes_and_numbers_are_symbols(positives: str) -> None:
    """torch.compile(dynamic=True): numbers that are passed can be compared, but not formatted nor taken apart."""

    def both(image: Tensor, text: Tensor, ids: Tensor, scale: float, bias: float) -> Tensor:
        ids_of = {} if positives == "diagonal" else {"image_ids": ids, "text_ids": ids}
        loss = contrastive_loss(image, text, scale, positives=positives, **ids_of)
        return loss + sigmoid_loss(image, text, scale, bias)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, scale in ((4, 10.0), (5, 20.0)):
        arguments = torch.randn(count, 8), torch.randn(count, 8), torch.arange(count) % 3, scale, -1.0
        torch.testing.assert_close(compiled(*arguments), both(*arguments))
