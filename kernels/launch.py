"""What every kernel file needs before a launch: path choice, dtype rules, argument checks. No kernel lives here."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E); the hardware instruction is exp2
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# CPU tensors take the PyTorch implementation. Tests set this to send them through the kernels in Triton's interpreter
# instead, in a process that was started with TRITON_INTERPRET=1 (Triton reads it when a kernel is decorated).
interpret_on_cpu = False


def launches_triton(x: Tensor) -> bool:
    """Whether `x` lies where Triton kernels run. Which dtypes and sizes an op's take, its `supported` says."""
    return x.is_cuda or (interpret_on_cpu and bool(knobs.runtime.interpret) and x.device.type == "cpu")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmax and statistics: float64 stays float64, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's when a process drives several GPUs."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def gpu_generation(x: Tensor) -> int:
    """Major compute capability of the device of `x`: 8 (Ampere, Ada), 9 (Hopper), 10 and up (Blackwell); CPU: 9."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def multiprocessors(x: Tensor) -> int:
    """Of the device of `x`; 1 in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may use on the device of `x`; an H100's in the interpreter."""
    return _shared_memory(x.device.index) if x.is_cuda else 232448


@functools.cache
def _shared_memory(device_index: int) -> int:
    limit: int = triton.runtime.driver.active.utils.get_device_properties(device_index)["max_shared_mem"]
    return limit


def readable(x: Tensor) -> Tensor:
    """`x` (..., rows, channels) as the kernels read it: channels next to each other, offsets of a matrix in 32 bits."""
    near = (x.shape[-1] == 1 or x.stride(-1) == 1) and x.shape[-2] * x.stride(-2) < 2**31
    return x if near else x.contiguous()


def autocast_off(x: Tensor) -> torch.autocast:
    """Autocast reaches into custom ops and would round their fp32 matmuls to bf16."""
    return torch.autocast(x.device.type, enabled=False)


_switching = threading.RLock()


@contextmanager
def exact_products(x: Tensor) -> Iterator[None]:
    """Inside, torch's own fp32 products on the device of `x` keep all their bits, whatever its switches say.

    Those (`set_float32_matmul_precision`, `allow_tf32`, `fp32_precision`) make them TF32 on a GPU, TF32 or bf16 on a
    CPU. They are the process's: one is touched only where it is on and acts on the dtype of `x`, by a thread at a time,
    and put back. Torch reads it when it launches a product, so that a CUDA graph holds what was captured.
    """
    if x.dtype == torch.float64 or (x.is_cuda and x.dtype != torch.float32):
        yield
        return
    # Setting goes through the newer of torch's two interfaces alone: what the older one reads is then as it was, after.
    switch: Any = torch.backends.cuda.matmul if x.is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _switching:
        before = switch.fp32_precision
        if before in ("none", "ieee"):
            yield
            return
        switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = "none"  # to follow torch.backends.fp32_precision, if that is where it came from
            if switch.fp32_precision != before:
                switch.fp32_precision = before


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op should take `x`: autocast's where it is on (float64 is left alone), else its own."""
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless `condition` holds: for users' mistakes; our own are asserts.

    A message with numbers that callers pass (eps, counts, scales) is a function: torch.compile(dynamic=True) makes such
    numbers symbols, which it cannot format, so that nothing may be formatted until the check has failed.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def require_alike(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share one floating dtype and one device."""
    (first_name, first), *others = tensors.items()
    if not first.is_floating_point():
        raise ValueError(f"{first_name} has dtype {first.dtype}; a floating dtype is needed")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype} and {first_name} {first.dtype}; cast one of them, or use autocast"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} and {first_name} on {first.device}; move one of them")
