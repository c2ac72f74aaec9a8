"""Compile what the launchers of the kernels launch, on a machine without a GPU: python tests/kernels/launches.py 90

`compile_check` compiles each kernel with argument types written by hand. Here Triton specialises the arguments of real
calls (strides, counts equal to 1, absent pointers), and ptxas may then use registers differently. Prints a line a
kernel; exits with 1 if one spills.
"""

import contextlib
import io
import re
import sys
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from eclip.kernels.compile_check import SHARED_MEMORY
from eclip.kernels.contrastive import triton_backward as contrastive_backward_kernels
from eclip.kernels.contrastive import triton_forward as contrastive_kernels
from eclip.kernels.contrastive import triton_tiles as contrastive_tile
from eclip.kernels.contrastive.positives import find_matches, positive_weights
from eclip.kernels.contrastive.problem import Logits, Wanted
from eclip.kernels.slot_attention import backward, forward

# Name: B, H, G, N, T, D, separate values, calls that share the tokens.
CALLS = {
    "decoder": (1000, 1, 1, 196, 20, 768, False, 6),
    "demo": (8, 1, 1, 144, 8, 384, False, 2),
    "12 heads": (200, 12, 12, 196, 20, 64, True, 1),
}
# Name: images, texts, D, kind, mode, bias, logits kept for the backward.
LOSSES = {
    "L_itc": (512, 512, 512, "both", "diagonal", False, True),
    "L_itc with soft labels": (300, 300, 768, "both", "share", False, False),
    "L_itc of one rank": (128, 896, 512, "both", "diagonal", False, False),
    "L_inter": (512, 512, 768, "rows", "mask", False, True),
    "sigmoid": (300, 300, 512, "sigmoid", "diagonal", True, False),
}
spilled = 0


class NoDevice:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: Any, grid: Any) -> Any:
    """What `kernel[grid]` becomes: a call that compiles, reports and does not launch."""

    def call(*args: Any, **options: Any) -> None:
        global spilled
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel.warmup(*args, grid=grid, **options)
        found = re.search(r"(\d+) bytes spill stores.*\n.*Used (\d+) registers", log.getvalue())
        if found:  # a kernel that was compiled a moment ago has no log
            spilled += int(found[1])
            print(f"  {kernel.fn.__name__}: {found[2]} registers, {found[1]} bytes spilled", flush=True)

    return call


def call_all(batch: int, heads: int, groups: int, n: int, t: int, d: int, separate: bool, calls: int) -> None:
    """Forward with the entropy, then backward and the tokens' gradient, as core and its autograd call them."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    q, k, v = empty(batch, heads, t, d), empty(batch, groups, n, d), empty(batch, groups, n, d) if separate else None
    out, mass, *_ = forward.triton_forward(q, k, v, None, None, 0.1, "den", 1e-6, None, False, True)
    grad_entropy = empty(batch, heads, dtype=torch.float32)
    grads = (empty(*out.shape), None, None, grad_entropy)
    *_, coefficients, _ = backward.triton_backward(*grads, q, k, v, None, None, mass, out, 0.1, "den", 1e-6, None, True)
    for which in ("queries", "grad_outs") if separate else ("both",):
        backward.triton_token_gradients([coefficients] * calls, [q] * calls, [grads[0]] * calls, [], k, which)


def call_loss(rows: int, cols: int, dim: int, kind: str, mode: str, bias: bool, keep: bool) -> None:
    """Forward and backward of one loss; rows are paired with the last columns."""
    image, text = (torch.zeros(n, dim, dtype=torch.bfloat16) for n in (rows, cols))
    matches = find_matches(torch.arange(rows), torch.arange(cols), mode) if mode != "diagonal" else None
    weights = positive_weights(image, len(text), matches, 0, kind, mode)
    biases = torch.zeros(cols) if bias else None
    kept = torch.empty(contrastive_tile.padded_shape(rows, cols), dtype=torch.bfloat16) if keep else None
    shift = torch.zeros(1)
    logits = Logits(
        image, text, torch.ones(1), biases, *(matches or (None, None)), *weights, shift, cols - rows, kind, mode
    )
    row_stat, col_stat, _ = contrastive_kernels.triton_statistics(logits, kept)
    wanted = Wanted(image=True, text=kind != "rows", scale=True, bias=bias)
    contrastive_backward_kernels.triton_gradients(logits, row_stat, col_stat, kept, torch.ones(()), wanted)


def main() -> int:
    JITFunction.__getitem__ = compile_only
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    arch = int(sys.argv[1])  # one a process: Triton keeps what it compiled for device 0
    driver.set_active(NoDevice(arch))
    forward.shared_memory = lambda _: SHARED_MEMORY[arch]
    forward.multiprocessors = lambda _: 108
    for module in (forward, backward, contrastive_kernels, contrastive_backward_kernels):
        module.gpu_generation = lambda _: arch // 10
    for name, sizes in CALLS.items():
        print(name, flush=True)
        call_all(*sizes)
    for name, problem in LOSSES.items():
        print(name, flush=True)
        call_loss(*problem)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
