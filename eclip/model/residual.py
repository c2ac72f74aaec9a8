"""The residual stream under bfloat16 autocast: float32 as autocast has it, or bfloat16 from a tower's first sum on.

Autocast computes norms in float32 and gives float32 back, so that every sum beside it is float32 too, and is cast for
the next matrix product. In bfloat16 all of them have half the bytes and nothing is cast. Statistics of a norm, and its
arithmetic, are float32 inside either way; what is rounded are sums, and the norm's weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.kernels.launch import autocast_dtype


def set_residual_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Run the residual streams of both towers and the decoder in `dtype` (bfloat16) where autocast has that dtype.

    None: as autocast has them. Elsewhere nothing changes, and what towers and decoder return keeps its dtype.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(type(module), "residual_dtype"):
            module.residual_dtype = dtype


def on_stream(x: Tensor, residual_dtype: torch.dtype | None) -> Tensor:
    """x in the stream's dtype."""
    if residual_dtype is None or autocast_dtype(x) != residual_dtype:
        return x
    return x.to(residual_dtype)


class LayerNorm(nn.LayerNorm):
    """A norm of the stream: what comes in its dtype goes out in it."""

    residual_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.residual_dtype is None or autocast_dtype(x) != self.residual_dtype:
            return super().forward(x)
        dtype = self.residual_dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(
                x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
            )


class LayerScale(nn.Module):
    """Learnable factor per channel on a residual branch (Touvron et al. 2021, arXiv 2103.17239)."""

    residual_dtype: torch.dtype | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        # 1, so that a tower from scratch starts as one without; the paper's 1e-5 is for nets deeper than 18 blocks.
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma if self.residual_dtype is None else self.gamma.to(x.dtype))
