"""What the kernels of the contrastive losses take, and when the forward keeps logits for the backward."""

from typing import Any

import pytest
import torch

from eclip.kernels.contrastive.options import keeps_logits, supported, takes_kernels


def test_keeps_only_where_it_fits(device: torch.device) -> None:
    half = torch.zeros(10, 8, dtype=torch.bfloat16, device=device)
    whole_tiles = 2 * 128 * 256
    assert keeps_logits(half, 12, "both", whole_tiles) and not keeps_logits(half, 12, "both", whole_tiles - 1)
    assert not keeps_logits(half, 12, "sigmoid", whole_tiles)  # its backward is one exp from the logits, and no row sum
    assert not keeps_logits(half.half(), 12, "both", whole_tiles)  # exp(64) is beyond fp16


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.bfloat16, {"kept": True}, None),
        (torch.float16, {}, None),
        (torch.float32, {"sides": "sigmoid"}, None),
        (torch.float64, {}, "no GPU kernel for torch.float64"),
        (torch.float64, {"kept": True}, "no GPU kernel for torch.float64"),
        (torch.float16, {"kept": True}, "bfloat16 alone"),
        (torch.bfloat16, {"kept": True, "sides": "sigmoid"}, "sigmoid loss keeps no logits"),
    ],
)
def test_what_the_kernels_take(dtype: torch.dtype, options: dict[str, Any], reason: str | None) -> None:
    found = supported(dtype, **options)
    assert found is None if reason is None else reason in str(found)


def test_float64_takes_pytorch(device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert takes_kernels(torch.zeros(2, 8, dtype=dtype, device=device)) == (supported(dtype) is None)


def test_cpu_keeps_nothing() -> None:
    assert not keeps_logits(torch.zeros(10, 8, dtype=torch.bfloat16), 12, "both", 2**20)
