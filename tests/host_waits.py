"""What makes the host wait for a GPU, found on machines without one: the device "meta" stands in for it.

A tensor of "meta" has a shape and a device that is not the host's, and no values. So code that runs on such tensors as
it would on a GPU cannot read one; `no_host_waits` names what tries, and the copies that a GPU is waited for as well:

    model, part = model.to(DEVICE), part.map(on_device)
    with no_host_waits():
        model(part).sum().backward()

On a real GPU (`no_host_waits(torch.device("cuda"))`) PyTorch itself watches; its first call compiles kernels, which may
wait, and belongs outside.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
"""Where the GPU would be."""
_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.allclose, _aten.masked_select, _aten.bincount,
    _aten._unique2, _aten.unique_consecutive, _aten.unique_dim, _aten.histc, _aten.is_nonzero, _aten.argwhere,
}  # fmt: skip
"""Read a value, or make a tensor whose shape depends on one."""
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class HostWait(AssertionError):
    """The host would wait for the device here."""


def on_device(tensor: Tensor) -> Tensor:
    """The stand-in of a tensor that lies on the GPU."""
    return torch.empty_like(tensor, device=DEVICE)


@contextmanager
def no_host_waits(device: torch.device = DEVICE) -> Iterator[None]:
    """Raise HostWait (on a GPU: RuntimeError) where the host would wait for `device`: see `waits`."""
    with ExitStack() as stack:
        if device.type == "cuda":
            before = torch.cuda.get_sync_debug_mode()
            stack.callback(torch.cuda.set_sync_debug_mode, before)
            torch.cuda.set_sync_debug_mode("error")
        else:
            stack.enter_context(_watched(_refuse))
        yield


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect the copies and index masks that would wait, one line each; a read has no value to go on with and raises.

    A wait is: a value read from the device, or a shape that depends on one; a copy to the host or from it without
    `non_blocking=True` (torch.tensor(..., device=...) among them); indexing with a mask of bools, or with host indices;
    a scalar tensor of the host in torch.where. Whether the host's memory is pinned is not seen.
    """
    found: list[str] = []
    with _watched(found.append):
        yield found


@contextmanager
def _watched(tell: Callable[[str], None]) -> Iterator[None]:
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    # Both refuse a "meta".
    def known(device: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device == DEVICE.type else autocast(device, *args, **kwargs)

    def enabled(*device: str) -> bool:
        return device != (DEVICE.type,) and is_enabled(*device)

    with (
        patch.object(torch, "autocast", known),
        patch.object(torch, "is_autocast_enabled", enabled),
        _Functions(tell),
        _Operators(tell),
    ):
        yield


def _refuse(what: str) -> None:
    raise HostWait(what)


class _Functions(TorchFunctionMode):
    """Sees what makes a tensor of numbers, for that is no operator."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        if func in _MAKERS and _on_device(made) and (func is Tensor.new_tensor or not any(map(_on_device, given))):
            self.tell(f"{func.__name__} copies numbers of the host to the device; make them beside the batch")
        return made


class _Operators(TorchDispatchMode):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reason := _reason(func, args, kwargs):
            self.tell(f"{func} {reason}")
        if (packet := func.overloadpacket) in (_aten.copy_, _aten._to_copy) and _leaves(packet, args, kwargs):
            # No values travel; what comes to the host is arbitrary, as it is on a GPU before it has arrived.
            return args[0] if packet is _aten.copy_ else torch.empty_like(args[0], device="cpu", dtype=kwargs["dtype"])
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if _is_read(func, args, kwargs) or "meta" in str(error):
                raise HostWait(f"{func} {reason or 'asks for values of the device'}") from error
            raise


def _on_device(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == DEVICE.type


def _on_host(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu"


def _leaves(packet: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy goes from the device to the host."""
    if packet is _aten.copy_:
        return _on_device(args[1]) and _on_host(args[0])
    target = kwargs.get("device")
    return _on_device(args[0]) and target is not None and target.type == "cpu"


def _is_read(func: Any, args: Any, kwargs: Any) -> bool:
    if not any(map(_on_device, tree_leaves((args, kwargs)))):
        return False
    counts = func.overloadpacket is _aten.repeat_interleave and kwargs.get("output_size") is None
    return func.overloadpacket in _READS or counts


def _reason(func: Any, args: Any, kwargs: Any) -> str | None:
    """Why the host would wait for an operator."""
    packet, tensors = func.overloadpacket, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if _is_read(func, args, kwargs):
        return "reads a value of the device"
    if packet is _aten.copy_:
        return _copy_reason(args[1], args[0].device, kwargs.get("non_blocking", len(args) > 2 and args[2]))
    if packet is _aten._to_copy:
        return _copy_reason(args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False))
    if packet in _INDEXING and any(map(_on_device, tensors)):
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return "counts the elements that a mask of the device chooses"
        if any(map(_on_host, indices)):
            return "copies indices of the host to the device"
    if packet is _aten.where and any(map(_on_device, tensors)) and any(map(_on_host, tensors)):
        return "copies a scalar of the host to the device"
    return None


def _copy_reason(source: Tensor, target: torch.device, non_blocking: bool) -> str | None:
    if _on_device(source) and target.type == "cpu" and not non_blocking:
        return "copies values of the device to the host"
    if _on_host(source) and target.type == DEVICE.type and not non_blocking:
        return f"copies {tuple(source.shape)} of the host to the device and waits for it; pass non_blocking=True"
    return None
