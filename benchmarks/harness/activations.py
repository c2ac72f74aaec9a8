"""What autograd keeps between forward and backward, in bytes: the same number on every device."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Saved:
    """What autograd holds instead of a saved tensor; it dies with the part of the graph that holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_for_backward(call: Callable[[], Any], given: Iterable[Tensor]) -> int:
    """Bytes of the tensors that `call`, a forward, leaves in the graph of what it returns.

    Each storage counts once and in full, a view as what it is a view of; those of `given` (inputs and parameters, which
    exist anyway) do not count. Sees what is saved with save_for_backward, as all of PyTorch does; a compiled function
    hides its own (ask the GPU's allocator instead).
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        held = _Saved(tensor.detach())  # an output that a node saves would keep that node alive by itself
        saved.add(held)
        return held

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = call()
    storages = {s.data_ptr(): s.nbytes() for s in (held.tensor.untyped_storage() for held in saved)}
    for tensor in given:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())
