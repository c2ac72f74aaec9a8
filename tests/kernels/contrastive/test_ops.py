"""The ops under the contrastive losses: their contract with PyTorch, what they keep, outputs that have no gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.kernels.contrastive import contrastive_loss, ops
from eclip.kernels.contrastive.problem import find_matches, positive_weights
from eclip.kernels.launch import launches_triton
from tests.kernels.contrastive.checks import Ignore, make_arguments, on, value_and_grads, with_features

NAMES = ("image_features", "text_features", "logit_scale")


def test_logits_are_kept_only_for_a_backward(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept are bf16 logits within the budget, on the way of the kernels, and only if a gradient will be asked for."""
    kept = []

    pair_total = ops.pair_total

    def total(*arguments: Any) -> tuple[Tensor, ...]:
        kept.append(arguments[-1])
        return pair_total(*arguments)

    monkeypatch.setattr(ops, "pair_total", total)
    features = torch.randn(2, 6, 8, device=path).bfloat16()
    kernels = launches_triton(features)
    for learnt in (False, True):
        image, text = features.clone().requires_grad_(learnt).unbind()
        contrastive_loss(image, text, 5.0)
        with torch.no_grad():
            contrastive_loss(image, text, 5.0)
        contrastive_loss(image, text, 5.0, keep_bytes=2 * 128 * 256 - 1)
        contrastive_loss(image.float(), text.float(), 5.0)
        assert kept == [learnt and kernels, False, False, False]
        kept.clear()


@pytest.mark.parametrize("positives", ["diagonal", "all", "mask"])
@pytest.mark.parametrize("sides", ["both", "rows", "sigmoid"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device: str, sides: str, positives: str) -> None:
    opcheck(torch.device(device), sides, positives)


def test_opcheck_interpreted(interpreter: torch.device) -> None:
    opcheck(interpreter, "both", "all")


def opcheck(path: torch.device, sides: str, positives: str) -> None:
    arguments = on(path, make_arguments(9, 8, positives, scale=5.0, keys=9 if sides == "both" else 12, bias=True))
    # Outputs are contiguous whatever the inputs are; a fake that disagrees breaks torch.compile.
    arguments["image_features"] = arguments["image_features"].T.contiguous().T
    leaves = [arguments[n].requires_grad_() for n in ("image_features", "text_features", "logit_scale", "bias")]
    image, text = leaves[:2]
    matches = None
    if positives != "diagonal":
        matches = find_matches(arguments["image_ids"], arguments["text_ids"], positives)
    weights = positive_weights(image, len(text), matches, 0, sides, positives)
    inputs = (*leaves, *(matches or (None, None)), *weights)
    torch.library.opcheck(ops.pair_total, (*inputs, sides, positives, False))
    _, *statistics, kept = ops.pair_total(*inputs, sides, positives, False)
    assert kept.numel() == 0
    inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in (*inputs, *statistics))
    for wanted in ((True, True, True, True), (False, True, True, False), (False, False, True, False)):
        torch.library.opcheck(
            ops.pair_gradients, (*inputs, None, torch.tensor(2.0, device=path), 0, sides, positives, *wanted)
        )


def test_outputs_but_the_total_have_no_gradient(path: torch.device) -> None:
    """Else autograd would make a zero gradient for each, as large as the logits that were kept."""
    arguments = on(path, with_features(make_arguments(6, 64), torch.bfloat16))
    leaves = [arguments[name].requires_grad_() for name in NAMES]
    ones = torch.ones(6, device=path)
    outputs = ops.pair_total(*leaves, *(None,) * 3, ones, ones, "both", "diagonal", True)
    assert [x.requires_grad for x in outputs] == [True, False, False, False, False]
    with pytest.raises(RuntimeError, match="does not require grad"):
        outputs[1].sum().backward()


def test_a_total_without_a_gradient_gives_none(path: torch.device) -> None:
    arguments = on(path, make_arguments(6, 8))
    leaves = {name: arguments[name].requires_grad_() for name in NAMES}
    loss = contrastive_loss(**arguments)
    Ignore.apply(loss).backward()
    assert all(x.grad is None for x in leaves.values())
    loss = contrastive_loss(**arguments)
    (loss + 2 * loss).backward()  # used twice
    once = value_and_grads(contrastive_loss, arguments)
    for name, x in leaves.items():
        torch.testing.assert_close(x.grad, 3 * once[name])


def test_a_backward_runs_as_often_as_it_is_asked(path: torch.device) -> None:
    arguments = on(path, with_features(make_arguments(6, 64), torch.bfloat16))
    leaves = [arguments[name].requires_grad_() for name in NAMES]
    loss = contrastive_loss(**arguments)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
