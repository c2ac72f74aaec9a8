"""`Bench`: what its calls return, and how it flushes the cache."""

import torch
from torch import Tensor

from benchmarks.harness.bench import Bench


def test_backward_calls_return_the_gradients() -> None:
    bench = Bench(None, {}, None)
    a, b, weight = (torch.randn(4, 4, device=bench.device) for _ in range(3))
    weight.requires_grad_()
    seeds = [torch.randn(4, 4, device=bench.device), torch.randn((), device=bench.device)]

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a @ b @ weight, (a * b).sum()

    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    expected = torch.autograd.grad(function(*leaves), [*leaves, weight], seeds)
    torch.testing.assert_close(bench.backward(function, a, b, seeds=seeds, also=[weight])(), expected)
    alone = bench.backward_alone(function, a, b, seeds=seeds)
    for _ in range(2):
        torch.testing.assert_close(alone(), expected[:2])
    assert not a.requires_grad
    assert weight.grad is None
    # A scalar needs no seed, and draws one.
    assert bench.backward(lambda a: a.sum(), a)()[0].unique().numel() == 1


def test_l2_is_flushed_by_reading() -> None:
    """A write would leave lines that the timed call has to write back."""
    flush = torch.zeros(8)
    before = flush._version
    Bench(None, {}, flush)._refill_l2()
    assert flush._version == before
