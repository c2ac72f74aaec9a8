"""What the Triton kernels of the contrastive losses take, how it must lie in memory, and in which tiles they cut it.

Letters: R rows (images), C columns (texts), D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import launch
from ..launch import KERNEL_DTYPES
from .problem import Logits


def supported(dtype: torch.dtype, sides: str = "both", *, kept: bool = False) -> str | None:
    """None if the kernels take features of `dtype`, and, with `kept`, keep exp(s - shift) of them; else why not.

    B, D and the number of ids are free. What the kernels do not take, and a CPU, is computed by plain.py.
    """
    if dtype not in KERNEL_DTYPES:
        return f"no GPU kernel for {dtype}; the loss is computed in PyTorch"
    if kept and dtype != torch.bfloat16:
        return f"exp(s - shift) reaches exp(64) and is kept in bfloat16 alone, not for features of {dtype}"
    if kept and sides == "sigmoid":
        return "the sigmoid loss keeps no logits: its backward has no sums to divide them by"
    return None


def takes_kernels(features: Tensor) -> bool:
    """Whether losses of these features go through the kernels, or through plain.py."""
    return launch.launches_triton(features) and supported(features.dtype) is None


def keeps_logits(image: Tensor, num_cols: int, sides: str, budget: int) -> bool:
    """Whether the forward should keep exp(s - shift), as bf16 of the `padded_shape` of (R, C), for the backward."""
    rows, cols = padded_shape(image.shape[0], num_cols)
    if 2 * rows * cols > budget or not takes_kernels(image):
        return False
    return supported(image.dtype, sides, kept=True) is None


def padded_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of memory for `store_tile`: whole tiles, so that no store needs a mask (which would cost registers)."""
    return triton.cdiv(rows, 128) * 128, triton.cdiv(cols, 256) * 256


def whole_tiles(features: Tensor) -> Tensor:
    """Features (n, D) as `products` reads them: D a multiple of 64, padded with 0, rows at multiples of 32 bytes.

    A copy unless they are so already. Else loads would need masks, and could not be 16 bytes wide.
    """
    missing = -features.shape[1] % 64
    if missing:
        return F.pad(features, (0, missing))
    aligned = features.stride(1) == 1 and features.stride(0) % 16 == 0 and features.data_ptr() % 16 == 0
    # Offsets within a tile of up to 256 rows are 32 bits wide.
    return features if aligned and features.stride(0) < 2**23 else features.clone(memory_format=torch.contiguous_format)


def as_kernels_read(logits: Logits) -> Logits:
    """The same logits with features in whole tiles and a contiguous bias."""
    bias = logits.bias
    return logits._replace(
        image=whole_tiles(logits.image),
        text=whole_tiles(logits.text),
        bias=None if bias is None else bias.contiguous(),
    )


# Else ptxas aims at 96 or 128 registers here and there, and spills.
_ALL_REGISTERS = {"maxnreg": 255}


def tile_options(dtype: torch.dtype, generation: int, *, small: bool = False, narrow: bool = False) -> dict[str, Any]:
    """Blocks, warps and stages of a kernel that is little but a matrix product; no listed call of compile_check spills.

    128 x 256 on Hopper: by arithmetic a 128 x 128 tile reads 64 bytes from L2 for every clock of its tensor cores and
    this one 48. An L2 that gives some 40 to each multiprocessor (not measured here) bounds both, this one less. narrow:
    for what would spill with it. small: for kernels that seldom run.
    """
    if dtype == torch.float32:  # at full precision the tensor cores are out: TF32 would miss s by 0.05 at scale 100
        full = {"PRECISION": "ieee", "BLOCK_R": 32, "BLOCK_C": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
        return full | _ALL_REGISTERS
    half = {"PRECISION": "tf32", "BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4}
    if small:
        return half | {"BLOCK_R": 64, "num_warps": 4, "num_stages": 3} | _ALL_REGISTERS
    if generation < 9:
        return half | {"BLOCK_D": 32}
    if generation > 9 or narrow:
        return half | _ALL_REGISTERS
    return half | {"BLOCK_C": 256}


def seldom_run(x: Tensor, pieces: int) -> tuple[int]:
    """Grid of a kernel whose programs mostly return at once, and else share `pieces` of work among them.

    A program a piece would be 65,536 for nothing in a block of G. Of the largest such kernel 2 fit a multiprocessor.
    """
    return (min(pieces, 4 * launch.multiprocessors(x)),)
