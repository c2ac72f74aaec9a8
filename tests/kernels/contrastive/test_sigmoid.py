"""The sigmoid loss against float64, against SigLIP's pseudo-code written out here, and on every path."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.kernels.contrastive import plain, sigmoid_loss, sigmoid_loss_reference
from tests.kernels.contrastive.checks import (
    Arguments,
    check,
    make_arguments,
    on,
    peak_bytes,
    value_and_grads,
    with_features,
)

POSITIVES = ("diagonal", "all", "mask")


def make(batch: int, dim: int, positives: str = "diagonal", *, bias: float = -10.0, **options: Any) -> Arguments:
    return make_arguments(batch, dim, positives, **options) | {"logit_bias": torch.tensor(bias)}


def check_loss(path: torch.device, arguments: Arguments) -> None:
    check(sigmoid_loss, sigmoid_loss_reference, on(path, arguments))


# --- A second formulation ---------------------------------------------------------------------------------------------


def plain_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    positives: str,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Pair by pair."""
    terms = []
    for i, image in enumerate(image_features):
        for j, text in enumerate(text_features):
            same = image_ids is not None and text_ids is not None and bool(image_ids[i] == text_ids[j])
            if positives == "mask" and same and i != j:
                continue
            z = 1 if i == j or (positives == "all" and same) else -1
            probability = torch.sigmoid(z * (logit_scale.squeeze() * (image @ text) + logit_bias))
            terms.append(-probability.log())
    return torch.stack(terms).sum() / len(image_features)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("ids", ["clusters", "crossed"])
def test_reference_and_op_agree_with_plain_formulation(positives: str, ids: str) -> None:
    arguments = make(7, 8, positives, bias=-2.0, scale=7.0, ids=ids)
    expected = value_and_grads(plain_loss, arguments, torch.float64)
    for loss in (sigmoid_loss_reference, sigmoid_loss):
        found = value_and_grads(loss, arguments, torch.float64)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_is_siglips_algorithm() -> None:
    """Algorithm 1 of the paper: l = -sum(log_sigmoid(labels * logits)) / n with labels = 2 eye(n) - ones(n)."""
    image, text = F.normalize(torch.randn(2, 6, 8), dim=-1)
    labels = 2 * torch.eye(6) - torch.ones(6, 6)
    expected = -F.logsigmoid(labels * (image @ text.T * 10 - 10)).sum() / 6
    torch.testing.assert_close(sigmoid_loss(image, text, 10.0, -10.0), expected)


# --- Accuracy on every path -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, dim", [(1, 8), (2, 512), (127, 8), (129, 100), (5, 1024)])
def test_ragged_shapes(path: torch.device, batch: int, dim: int) -> None:
    check_loss(path, make(batch, dim))


@pytest.mark.parametrize("positives", ["all", "mask"])
@pytest.mark.parametrize("ids", ["clusters", "one", "distinct", "crossed"])
def test_ids(path: torch.device, positives: str, ids: str) -> None:
    check_loss(path, make(20, 24, positives, ids=ids))


@pytest.mark.parametrize("scale", [1.0, 50.0, 117.0])
@pytest.mark.parametrize("bias", [-60.0, 0.0, 30.0])
def test_scales_and_biases(path: torch.device, scale: float, bias: float) -> None:
    """softplus(s) is s where s is large, and e^s where it is small."""
    check_loss(path, make(37, 64, scale=scale, bias=bias))


def test_large_logits_in_double() -> None:
    arguments = make(20, 8, scale=100.0, bias=5.0)
    found, exact = (value_and_grads(loss, arguments, torch.float64) for loss in (sigmoid_loss, sigmoid_loss_reference))
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positives", POSITIVES)
def test_half_precision_features(path: torch.device, dtype: torch.dtype, positives: str) -> None:
    check_loss(path, with_features(make(24, 24, positives), dtype))


def test_several_tiles_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_TILE", 32)
    for positives in ("all", "mask"):
        check_loss(torch.device("cpu"), make(135, 16, positives))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_repeats_bit_by_bit(device: str, dtype: torch.dtype) -> None:
    arguments = with_features(on(torch.device(device), make(1500, 32, "all")), dtype)
    first, second = (value_and_grads(sigmoid_loss, arguments) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", POSITIVES)
def test_gradcheck(positives: str) -> None:
    arguments = make(6, 5, positives, scale=3.0, bias=-1.0)
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    leaves = [arguments.pop(name).double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: sigmoid_loss(**arguments, **dict(zip(names, values, strict=True))), leaves
    )


def test_scale_and_bias_as_numbers_or_tensors() -> None:
    image, text = torch.randn(2, 6, 8)
    expected = sigmoid_loss(image, text, 3.0, -1.0)
    assert expected.shape == () and expected.dtype == torch.float32
    for make_tensor in (torch.tensor, lambda x: torch.tensor([x]), lambda x: torch.tensor(x, dtype=torch.float64)):
        assert sigmoid_loss(image, text, make_tensor(3.0), make_tensor(-1.0)) == expected


def test_bias_gradient_is_summed_before_it_is_rounded() -> None:
    """A bias in bf16: each of B = 300 gradients rounded, then added up in bf16, would be off by a percent."""
    arguments = make(300, 8, scale=3.0, bias=-1.0)
    exact = value_and_grads(sigmoid_loss_reference, arguments, torch.float64)["logit_bias"]
    arguments["logit_bias"] = arguments["logit_bias"].bfloat16()
    found = value_and_grads(sigmoid_loss, arguments)["logit_bias"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=0)


def test_autocast_rounds_the_features_alone() -> None:
    arguments = make(40, 16)
    rounded = value_and_grads(sigmoid_loss, with_features(arguments, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_grads(sigmoid_loss, arguments)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, rounded[name].float()), name


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_TILE", 128)

    def peak(batch: int) -> int:
        arguments = make(batch, 128, "all")
        return peak_bytes(lambda: value_and_grads(sigmoid_loss, arguments))

    small, large = peak(1024), peak(2048)
    assert 1.5 * small < large <= 2.1 * small


def test_compiles_without_graph_breaks() -> None:
    arguments = make(10, 8, "all")
    compiled = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager")
    expected = value_and_grads(sigmoid_loss, arguments)
    for name, value in value_and_grads(compiled, arguments).items():
        torch.testing.assert_close(value, expected[name], msg=name)


# --- Errors -----------------------------------------------------------------------------------------------------------

ONES = torch.ones(3, 4)
IDS = torch.arange(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_features": torch.ones(4, 4)}, "equally many rows"),
        ({"image_features": torch.ones(0, 4), "text_features": torch.ones(0, 4)}, "no pair"),
        ({"logit_scale": math.nan}, "logit_scale=nan is not finite"),
        ({"logit_scale": torch.tensor(math.inf)}, "logit_scale=inf is not finite"),
        ({"logit_bias": math.inf}, "logit_bias=inf is not finite"),
        ({"logit_bias": torch.ones(3)}, r"logit_bias \(3,\)"),
        ({"positives": "soft"}, "'soft' is not one of 'diagonal', 'all', 'mask'"),
        ({"positives": "all"}, "pass image_ids"),
        ({"image_ids": IDS}, "'diagonal' does not use ids"),
        ({"logit_bias": torch.ones((), device="meta")}, "logit_bias on meta"),
        ({"rows_per_rank": (3, 3)}, r"each of the group's 1 ranks"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], message: str) -> None:
    arguments = {"image_features": ONES, "text_features": ONES, "logit_scale": 1.0, "logit_bias": -1.0, **change}
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(**arguments)
