"""Launchers called without a GPU: their kernels as Triton would compile them, specialised by the call's arguments.

Tensors lie on the "meta" device, so that they have shapes, strides and dtypes but no memory. Triton's hook before a
compilation notes what is asked for and says not to compile; a kernel that is not compiled is not launched.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .. import launch
from .calls import Call, describe
from .chips import MULTIPROCESSORS, SHARED_MEMORY


@dataclass(frozen=True)
class Launch:
    """A kernel as some call launches it on a chip."""

    call: str
    """The first call that does."""
    arch: int
    kernel: Any = field(repr=False)
    """A function decorated with @triton.jit."""
    specialization: str = field(repr=False)
    """What its arguments are, in Triton's own words (JSON): `kernel.preload` takes it."""

    @property
    def name(self) -> str:
        function: str = self.kernel.fn.__name__
        return function


class NoDevice:
    """As much of a Triton driver as compiling takes. Triton keeps kernels by device, so each architecture is one."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def as_if_on(arch: int) -> Iterator[None]:
    """Inside, Triton and the launchers find an sm_<arch>."""
    driver.set_active(NoDevice(arch))
    answers = {
        "gpu_generation": arch // 10,
        "multiprocessors": MULTIPROCESSORS,
        "shared_memory": SHARED_MEMORY[arch],
    }
    with ExitStack() as stubs:
        for question, answer in answers.items():
            stubs.enter_context(mock.patch.object(launch, question, return_value=answer))
        yield


def launches(calls: Iterable[Call], arch: int) -> list[Launch]:
    """What the calls launch on an sm_<arch>; a kernel that several specialise alike once, under the first of them."""
    found: dict[tuple[str, str], Launch] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        new = Launch(describe(call), arch, fn.jit_function, compile["specialization_data"])
        found.setdefault((new.name, compile["key"]), new)
        return True  # do not compile

    with as_if_on(arch), torch.device("meta"), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        for call in calls:
            call.run()
    return list(found.values())
