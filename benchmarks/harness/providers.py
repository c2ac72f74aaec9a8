"""What a kernel is compared with: its own reference, run eagerly and by torch.compile.

    attend = provide("compile", ours=slot_attention, reference=slot_attention_reference)

Published packages that compute the same belong in the op's own folder (contrastive/peers.py), imported where they run,
so that a machine without them still runs the rest.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

PROVIDERS = ("eager", "compile", "ours")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of `function` for fixed shapes; skips the test on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip("torch.compile is timed on GPUs only: on a CPU its first call takes 12 s and nothing is learned")
    torch._dynamo.reset()  # else a new shape compiles a dynamic-shape kernel, slower than the one it stands for
    return torch.compile(function, dynamic=False)


def provide(provider: str, *, ours: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The callable that `provider` names: the public op, or its reference eagerly or compiled.

    Skips the test for "compile" on a CPU.
    Raises ValueError for a name not in PROVIDERS.
    """
    if provider == "ours":
        return ours
    if provider == "eager":
        return reference
    if provider == "compile":
        return compiled(reference)
    raise ValueError(f"provider={provider!r}; choose one of {', '.join(PROVIDERS)}")
