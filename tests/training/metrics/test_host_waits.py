"""That the watch for host waits sees each of them, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.host_waits import DEVICE, HostWait, no_host_waits, on_device, waits

NUMBERS = torch.arange(3.0)

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "a range's end": lambda x: torch.arange(x[0]),
    "a slice's end": lambda x: x[: x[0].long()],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "into a host tensor": lambda x: torch.empty(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "a mask as index": lambda x: x[x > 0],
    "a mask as index of what is set": lambda x: x.__setitem__(x > 0, x[:1]),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "one_hot": lambda x: torch.nn.functional.one_hot(x.long()),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "a choice of a scalar of the host": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
    "to the device": lambda x: NUMBERS.to(x.device),
    "to the device of a tensor": lambda x: NUMBERS.to(x),
    "into a device tensor": lambda x: x.copy_(NUMBERS),
    "host indices": lambda x: x[torch.tensor([0, 1])],
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "in backward": lambda x: _ReadsInBackward.apply(x.requires_grad_()).sum().backward(),
}
FINE: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + torch.tensor(1.0)).sum() / 3,
    "a choice of a number": lambda x: torch.where(x > 0, x, 1.0),
    "device indices": lambda x: x[torch.arange(2, device=x.device)],
    "a range of known length": lambda x: torch.arange(len(x), device=x.device),
    "repeat_interleave of known length": lambda x: x.repeat_interleave(x.long(), output_size=5),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "a number set": lambda x: x.__setitem__(0, 5.0),
    "to the device, non_blocking": lambda x: NUMBERS.to(x.device, non_blocking=True),
    "to the host, non_blocking": lambda x: x.to("cpu", non_blocking=True),
    "a cast": lambda x: x.to(torch.bfloat16),
    "host work": lambda x: (NUMBERS[NUMBERS > 0].tolist(), float(NUMBERS.sum()), NUMBERS.nonzero(), NUMBERS.clone()),
    "finite": lambda x: x.isfinite().all(),
    "a product and its gradient": lambda x: (x.requires_grad_() @ x).backward(),
    "the norm of a gradient": lambda x: torch.nn.utils.clip_grad_norm_([_with_gradient(x)], 1.0),
}


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * float(grad.sum())


def _with_gradient(x: Tensor) -> Tensor:
    parameter = torch.nn.Parameter(x)
    parameter.grad = torch.empty_like(x)
    return parameter


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_refused(name: str) -> None:
    x = on_device(NUMBERS)
    with pytest.raises(HostWait), no_host_waits():
        WAITS[name](x)


@pytest.mark.parametrize("name", FINE)
def test_what_waits_for_nothing_passes(name: str) -> None:
    with no_host_waits():
        FINE[name](on_device(NUMBERS))


def test_waits_that_can_be_gone_past_are_collected() -> None:
    x = on_device(NUMBERS)
    with waits() as found:
        NUMBERS.to(DEVICE)
        torch.tensor([1.0], device=DEVICE)
        x[torch.tensor([0])]
        x * 2
    assert [line.split()[0] for line in found] == ["aten._to_copy.default", "tensor", "aten.index.Tensor"]


def test_a_fault_of_another_kind_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="Size") as caught, no_host_waits():
        on_device(NUMBERS) + on_device(torch.zeros(4))
    assert not isinstance(caught.value, HostWait)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WAITS)
def test_the_gpu_agrees_on_waits(name: str) -> None:
    gpu = torch.device("cuda")
    x = NUMBERS.to(gpu)
    with pytest.raises(RuntimeError), no_host_waits(gpu):
        WAITS[name](x)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FINE)
def test_the_gpu_agrees_on_what_is_fine(name: str) -> None:
    gpu = torch.device("cuda")
    x = NUMBERS.to(gpu)
    FINE[name](x.clone())
    with no_host_waits(gpu):
        FINE[name](x)
