"""The contrastive loss against float64, against a second formulation written here, and on every path."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.kernels.contrastive import KEEP_BYTES, contrastive_loss, contrastive_loss_reference
from tests.kernels.contrastive.checks import (
    Arguments,
    check,
    make_arguments,
    on,
    value_and_grads,
    with_features,
)

POSITIVES = ("diagonal", "soft", "mask", "supcon")
BATCHES, DIMS = (1, 2, 127, 128, 129, 1000), (8, 64, 512, 768, 1024)


def check_loss(path: torch.device, arguments: Arguments, **options: Any) -> None:
    check(contrastive_loss, contrastive_loss_reference, on(path, arguments), **options)


# --- A second formulation: loops over rows, Python lists of positives -------------------------------------------------


def plain_side(logits: Tensor, row_ids: list[int] | None, col_ids: list[int] | None, positives: str) -> Tensor:
    """Mean over rows of the loss of one side, one row at a time; logits (R, C) float64."""
    losses = []
    for i in range(len(logits)):
        same = [j for j in range(logits.shape[1]) if row_ids is not None and row_ids[i] == col_ids[j]]
        if positives == "diagonal":
            losses.append(-F.log_softmax(logits[i], 0)[i])
        elif positives == "mask":
            kept = [j for j in range(logits.shape[1]) if j == i or j not in same]
            losses.append(-F.log_softmax(logits[i, kept], 0)[kept.index(i)])
        elif positives == "supcon":
            losses.append(torch.stack([-F.log_softmax(logits[i], 0)[j] for j in same]).mean())
        else:
            label = torch.zeros(logits.shape[1], dtype=torch.float64)
            label[same] = 1 / len(same)
            losses.append(F.cross_entropy(logits[i], label))
    return torch.stack(losses).mean()


def plain_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    positives: str,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    bias: Tensor | None = None,
    sides: str = "both",
) -> Tensor:
    row_ids, col_ids = (None if ids is None else ids.tolist() for ids in (image_ids, text_ids))
    texts = text_features.detach() if sides == "rows" else text_features
    logits = torch.stack([torch.stack([logit_scale.squeeze() * (i @ t) for t in texts]) for i in image_features])
    if bias is not None:
        logits = logits + bias
    rows = plain_side(logits, row_ids, col_ids, positives)
    if sides == "rows":
        return rows
    return (rows + plain_side(logits.T, col_ids, row_ids, positives)) / 2


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_reference_and_op_agree_with_plain_formulation(positives: str, sides: str) -> None:
    keys = 9 if sides == "both" else 12
    arguments = make_arguments(9, 8, positives, scale=7.0, keys=keys, bias=True) | {"sides": sides}
    plain = value_and_grads(plain_loss, arguments, torch.float64)
    for loss in (contrastive_loss_reference, contrastive_loss):
        found = value_and_grads(loss, arguments, torch.float64)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_soft_labels_are_the_label_matrix_of_eclip() -> None:
    """L = (CE(Y, softmax_rows) + CE(Y, softmax_columns)) / 2 with Y_ij = [c_i = c_j] / #{k: c_k = c_i}, spelled out."""
    image, text = torch.randn(2, 4, 8)
    label = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    logits = 2 * image @ text.T
    expected = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
    found = contrastive_loss(image, text, 2.0, image_ids=torch.tensor([5, 3, 5, 1]), positives="soft")
    torch.testing.assert_close(found, expected)


def test_pair_is_positive_even_where_its_ids_differ() -> None:
    """Titles and images may carry different ids; the pair still counts, so no row is without a positive."""
    image, text = torch.randn(2, 3, 8)
    ids = {"image_ids": torch.tensor([1, 2, 3]), "text_ids": torch.tensor([2, 7, 3])}
    label = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]])  # row 1 matches column 0 by id, column 1 by place
    logits = 2 * image @ text.T
    columns = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]])
    expected = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, columns)) / 2
    for loss in (contrastive_loss, contrastive_loss_reference):
        torch.testing.assert_close(loss(image, text, 2.0, positives="soft", **ids), expected)
        same = loss(image, text, 2.0, positives="mask", **ids)
        kept = logits.clone()
        kept[1, 0] = -math.inf
        target = torch.arange(3)
        torch.testing.assert_close(same, (F.cross_entropy(kept, target) + F.cross_entropy(kept.T, target)) / 2)


# --- Accuracy on every path -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, dim", list(itertools.product(BATCHES, DIMS)))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ragged_shapes(device: str, batch: int, dim: int) -> None:
    check_loss(torch.device(device), make_arguments(batch, dim))


@pytest.mark.parametrize("batch, dim", [(1, 1024), (2, 512), (127, 8), (128, 64), (129, 100), (5, 768)])
def test_ragged_shapes_interpreted(interpreter: torch.device, batch: int, dim: int) -> None:
    """Every batch around a tile's side and every width, but not each with each."""
    check_loss(interpreter, make_arguments(batch, dim))


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("sides", ["both", "rows"])
@pytest.mark.parametrize("bias", [False, True])
def test_positives_sides_and_bias(path: torch.device, positives: str, sides: str, bias: bool) -> None:
    keys = 20 if sides == "both" else 31
    check_loss(path, make_arguments(20, 24, positives, keys=keys, bias=bias) | {"sides": sides})


@pytest.mark.parametrize("positives", ["soft", "mask"])
@pytest.mark.parametrize("ids", ["one", "distinct", "crossed"])
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_ids(path: torch.device, positives: str, ids: str, sides: str) -> None:
    """Beside clusters: all rows of one id, every id once, and pairs whose two ids differ."""
    check_loss(path, make_arguments(20, 24, positives, ids=ids) | {"sides": sides})


@pytest.mark.parametrize("scale", [1.0, 14.0, 50.0, 100.0, 117.0])
@pytest.mark.parametrize("kind", ["random", "aligned", "opposed"])
def test_scales(path: torch.device, scale: float, kind: str) -> None:
    arguments = make_arguments(67, 64, scale=scale)
    image, text = arguments["image_features"], arguments["text_features"]
    if kind == "aligned":  # in training: the positive is among the largest
        text = F.normalize(0.4 * image + text, dim=-1)
    if kind == "opposed":  # every cosine near -1: exp(scale * cosine) without a shift is 0 in fp32
        text = F.normalize(-image.mean(0) + 0.01 * text, dim=-1)
        image = F.normalize(image.mean(0) + 0.01 * image, dim=-1)
        assert (image @ text.T).max() < -0.5
    check_loss(path, arguments | {"image_features": image, "text_features": text})


@pytest.mark.parametrize("scale", [50.0, 100.0])
@pytest.mark.parametrize("positives", ["soft", "mask"])
@pytest.mark.parametrize(
    "dtype, keep_bytes, roundings",
    [(torch.float16, 0, 1), (torch.bfloat16, 0, 1), (torch.bfloat16, KEEP_BYTES, 2)],
    ids=["fp16", "bf16", "bf16-kept"],  # kept logits are rounded, and again when they are divided by their sums
)
def test_half_precision_features(
    path: torch.device, dtype: torch.dtype, keep_bytes: int, roundings: int, positives: str, scale: float
) -> None:
    arguments = with_features(make_arguments(24, 24, positives, scale=scale), dtype)
    check_loss(path, arguments, keep_bytes=keep_bytes, roundings=roundings)


@pytest.mark.parametrize("dim, width", [(16, 40), (64, 71), (64, 80)])
def test_strided_features(path: torch.device, dim: int, width: int) -> None:
    """Rows of a wider matrix; the kernels copy the first two, pad one of them, and read the third where it lies."""
    arguments = on(path, make_arguments(21, dim))
    wide = torch.full((21, width), torch.nan, device=path)
    wide[:, :dim] = arguments["image_features"]
    text = arguments["text_features"].T.contiguous().T
    check_loss(path, arguments | {"image_features": wide[:, :dim], "text_features": text})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positives", ["soft", "mask"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_repeats_bit_by_bit(device: str, dtype: torch.dtype, positives: str) -> None:
    arguments = make_arguments(1500, 32, positives, scale=50.0, bias=True)
    arguments = with_features(on(torch.device(device), arguments), dtype)
    first, second = (value_and_grads(contrastive_loss, arguments) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_inputs_are_left_alone(path: torch.device) -> None:
    arguments = on(path, make_arguments(20, 16, "mask", bias=True))
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    value_and_grads(contrastive_loss, arguments)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


# --- Options ----------------------------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    arguments = make_arguments(6, 5, "soft", scale=3.0, bias=True)
    names = ("image_features", "text_features", "logit_scale", "bias")
    leaves = [arguments.pop(name).double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: contrastive_loss(**arguments, **dict(zip(names, values, strict=True))), leaves
    )


def test_scale_as_number_or_scalar_tensor() -> None:
    image, text = torch.randn(2, 6, 8)
    expected = contrastive_loss(image, text, torch.tensor([12.0]))
    for scale in (12, 12.0, torch.tensor(12.0), torch.tensor(12.0, dtype=torch.float64)):
        found = contrastive_loss(image, text, scale)
        assert found.shape == ()
        assert found.dtype == torch.float32
        assert found == expected


def test_only_requested_gradients() -> None:
    image, text = torch.randn(2, 6, 8)
    text.requires_grad_()
    contrastive_loss(image, text, 5.0).backward()
    assert text.grad is not None
    keys = text.detach().clone().requires_grad_()
    loss = contrastive_loss(image.requires_grad_(), keys, 5.0, sides="rows")
    loss.backward()
    assert keys.grad is None
    with torch.no_grad():
        assert not contrastive_loss(image, text, 5.0).requires_grad


def test_autocast_rounds_the_features_alone() -> None:
    """Under autocast the loss is that of features cast by hand; its reference does not round."""
    arguments = make_arguments(40, 16, scale=100.0, bias=True)
    rounded = value_and_grads(contrastive_loss, with_features(arguments, torch.bfloat16))
    exact = contrastive_loss_reference(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_grads(contrastive_loss, arguments)
        assert torch.equal(contrastive_loss_reference(**arguments), exact)
        mixed = arguments | {"text_features": arguments["text_features"].bfloat16()}
        assert torch.equal(contrastive_loss(**mixed), found["loss"])
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, rounded[name].float()), name


@pytest.mark.parametrize("positives", ["diagonal", "soft"])
def test_compiles_without_graph_breaks(positives: str) -> None:
    arguments = make_arguments(10, 8, positives, scale=5.0, bias=True)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    expected = value_and_grads(contrastive_loss, arguments)
    for name, value in value_and_grads(compiled, arguments).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(**arguments), contrastive_loss(**arguments))
