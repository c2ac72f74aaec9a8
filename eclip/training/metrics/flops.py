"""FLOPs of a step: of the matrix products that its mathematics asks for, each counted once.

Model FLOPs, as in MFU (PaLM, arXiv 2204.02311): what is done twice to save memory is no more of the model. So not
counted are

    - the recomputation of activation checkpointing, and of scores and logits inside attention and our kernels
    - what runs inside `overhead()`: the first of the two forward passes of a step on micro-batches
    - norms, activations, softmaxes, sums: everything that is no matrix product

Formulas are PyTorch's (torch.utils.flop_counter); those of our kernels stand beside their ops. Our absorbed slot
attention counts its own products, fewer than those of the keys and values that it never builds. Padded attention counts
the padding. Code under torch.compile runs uncompiled while it is counted: Dynamo steps aside where a mode is active.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_overheads = 0


class ModelFlops(TorchDispatchMode):
    """Adds up FLOPs while it is entered; the passes run as without it. `total` is this rank's."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = {**flop_registry, **_attention_on_cpus(), **_without_scores()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func.overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if formula is not None and not _overheads and not _recomputes():
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@contextmanager
def overhead() -> Iterator[None]:
    """Around work that a step does for the sake of memory: its products are no model FLOPs."""
    global _overheads
    _overheads += 1
    try:
        yield
    finally:
        _overheads -= 1


def _recomputes() -> bool:
    """Whether this is a forward pass inside a backward pass, which itself runs without gradients and saves nothing.

    A custom Function's forward runs without gradients too; but checkpoint catches what it saves.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    catches = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return in_backward and (torch.is_grad_enabled() or catches)


def _attention_on_cpus() -> dict[Any, Callable[..., int]]:
    """PyTorch counts attention on GPUs alone. (B, H, T, d), (B, H, N, d), (B, H, N, d): two products, then four."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * forward(q, k, v)

    return {
        _aten._scaled_dot_product_flash_attention_for_cpu: forward,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _without_scores() -> dict[Any, Callable[..., int]]:
    """The backward passes of attention: PyTorch counts five products, of which one makes the scores again."""

    def four_of_five(formula: Callable[..., int]) -> Callable[..., int]:
        return lambda *args, **kwargs: formula(*args, **kwargs) * 4 // 5

    names = {packet: str(packet) for packet in flop_registry}
    return {
        packet: four_of_five(flop_registry[packet])
        for packet, name in names.items()
        if name.startswith(("aten._", "torch_attn._")) and name.endswith(("attention_backward", "attn_backward"))
    }
