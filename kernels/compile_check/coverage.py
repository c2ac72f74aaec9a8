"""Which kernels of the ops' folders no call launches: a new kernel is not forgotten."""

import re
from collections.abc import Iterable
from pathlib import Path

from .stub import Launch

KERNELS = Path(__file__).parents[1]
_KERNEL = re.compile(r"^@triton\.jit\ndef (\w+_kernel)\(", re.MULTILINE)  # other functions are parts of kernels


def kernels() -> set[str]:
    """Names of all kernels in the ops' folders."""
    return {name for file in KERNELS.glob("*/*.py") for name in _KERNEL.findall(file.read_text(encoding="utf-8"))}


def uncompiled(found: Iterable[Launch]) -> list[str]:
    return sorted(kernels() - {launch.name for launch in found})
