"""Counting the bytes that autograd keeps."""

import torch
from torch import Tensor

from benchmarks.harness.activations import kept_for_backward


def test_each_storage_that_the_graph_holds_counts_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    weight = torch.randn(10, 10, requires_grad=True)

    def call() -> Tensor:
        hidden = x.exp()  # 400 bytes: saved by exp, by both products, one of them through a view
        (hidden * hidden.exp()).sum()  # a branch that nothing returned needs
        return (hidden @ weight).sum() + (hidden[:5] @ weight).sum()

    assert kept_for_backward(call, [x, weight]) == 400
    assert kept_for_backward(call, [x]) == 800
    assert kept_for_backward(lambda: x + weight, []) == 0


def test_own_functions_are_counted_and_still_differentiate() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(torch.ones(50))
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0].mean()

    x = torch.randn(3, requires_grad=True)
    assert kept_for_backward(lambda: Double.apply(x), [x]) == 200
