"""The contrastive loss against float64, against a second formulation written here, and on every path."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eclip.kernels import contrastive_kernels, contrastive_statistics
from eclip.kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference
from tests.helpers import assert_as_accurate

POSITIVES = ("diagonal", "soft", "mask", "supcon")


def make_inputs(
    batch: int, dim: int, positives: str = "diagonal", *, keys: int | None = None, bias: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Normalised features (B, D) and (keys, D) in fp32, and the keyword arguments; ids form clusters of about three."""
    generator = torch.Generator().manual_seed(seed)
    keys = batch if keys is None else keys
    image, text = (F.normalize(torch.randn(n, dim, generator=generator), dim=-1) for n in (batch, keys))
    options: dict[str, Any] = {"positives": positives}
    if positives != "diagonal":
        ids = torch.randint(max(1, batch // 3), (keys,), generator=generator) - (1 << 40)
        options.update(image_ids=ids[:batch].clone(), text_ids=ids)
    if bias:
        options["bias"] = torch.randn(keys, generator=generator)
    return image, text, options


def to_path(inputs: tuple[Tensor, Tensor, dict[str, Any]], path: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
    image, text, options = inputs
    return image.to(path), text.to(path), {k: v.to(path) if isinstance(v, Tensor) else v for k, v in options.items()}


def value_and_grads(
    loss: Any, image: Tensor, text: Tensor, scale: float, options: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Loss and the gradient of every input that has one, all inputs first cast to `dtype`."""
    leaves = {"image": image, "text": text, "scale": torch.tensor([scale], device=image.device)}
    if "bias" in options:
        leaves["bias"] = options["bias"]
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    rest = {**options, **({"bias": leaves["bias"]} if "bias" in leaves else {})}
    value = loss(leaves["image"], leaves["text"], leaves["scale"], **rest)
    value.backward()
    return {"loss": value.detach(), **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


def check(
    path: torch.device, inputs: tuple[Tensor, Tensor, dict[str, Any]], scale: float, dtype: torch.dtype = torch.float32
) -> None:
    """`contrastive_loss` on `path` is as accurate as the reference in the same dtype, in value and every gradient.

    Allowed in any case: 8 units in the last place of a logit, |s| <= scale, which is the relative error of exp(s). The
    loss and d(scale), whose terms are of order scale and 1, may cancel to nothing: there the error is absolute.
    """
    image, text, options = to_path(inputs, path)
    image, text = image.to(dtype), text.to(dtype)
    ours = value_and_grads(contrastive_loss, image, text, scale, options)
    low = value_and_grads(contrastive_loss_reference, image, text, scale, options)
    exact = value_and_grads(contrastive_loss_reference, image, text, scale, options, torch.float64)
    assert ours.keys() == exact.keys()
    floor = 8 * torch.finfo(torch.float32).eps * max(1.0, scale)
    for name in ours:
        size = exact[name].abs().max().item()
        allowed = floor
        if name in ("loss", "scale") or size < 1e-12:  # of one pair all gradients are 0
            order = scale if name in ("image", "text") else 1
            allowed = floor * order / max(size, torch.finfo(torch.float32).tiny)
        assert_as_accurate(ours[name], low[name], exact[name], floor=allowed, name=name)


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


def plain_loss(image: Tensor, text: Tensor, scale: Tensor, sides: str = "both", **options: Any) -> Tensor:
    image_ids, text_ids = (options[k].tolist() if k in options else None for k in ("image_ids", "text_ids"))
    logits = torch.stack([torch.stack([scale.squeeze() * (i @ t) for t in text]) for i in image])
    if "bias" in options:
        logits = logits + options["bias"]
    rows = plain_side(logits, image_ids, text_ids, options["positives"])
    if sides == "rows":
        return rows
    return (rows + plain_side(logits.T, text_ids, image_ids, options["positives"])) / 2


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_reference_and_op_agree_with_plain_formulation(positives: str, sides: str) -> None:
    keys = 9 if sides == "both" else 12
    image, text, options = make_inputs(9, 8, positives, keys=keys, bias=True)
    options["sides"] = sides
    plain = value_and_grads(plain_loss, image, text, 7.0, options, torch.float64)
    if sides == "rows":
        del plain["text"]  # keys are fixed: the plain formulation does not know
    for loss in (contrastive_loss_reference, contrastive_loss):
        found = value_and_grads(loss, image, text, 7.0, options, torch.float64)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_soft_labels_are_the_label_matrix_of_eclip() -> None:
    """L = (CE(Y, softmax_rows) + CE(Y, softmax_columns)) / 2 with Y_ij = [c_i = c_j] / #{k: c_k = c_i}, spelled out."""
    image, text, _ = make_inputs(4, 8)
    label = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    logits = 10 * image @ text.T
    expected = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
    found = contrastive_loss(image, text, 10.0, image_ids=torch.tensor([5, 3, 5, 1]), positives="soft")
    torch.testing.assert_close(found, expected)


def test_pair_is_positive_even_where_its_ids_differ() -> None:
    """Titles and images may carry different ids; the pair still counts, so no row is without a positive."""
    image, text, _ = make_inputs(3, 8)
    ids = {"image_ids": torch.tensor([1, 2, 3]), "text_ids": torch.tensor([2, 7, 3])}
    label = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]])  # row 1 matches column 0 by id, column 1 by place
    logits = 10 * image @ text.T
    columns = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]])
    expected = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, columns)) / 2
    for loss in (contrastive_loss, contrastive_loss_reference):
        torch.testing.assert_close(loss(image, text, 10.0, positives="soft", **ids), expected)
        same = loss(image, text, 10.0, positives="mask", **ids)
        kept = logits.clone()
        kept[1, 0] = -math.inf
        target = torch.arange(3)
        torch.testing.assert_close(same, (F.cross_entropy(kept, target) + F.cross_entropy(kept.T, target)) / 2)


# --- Accuracy on every path -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5, 127, 129])
@pytest.mark.parametrize("dim", [8, 64, 100])
def test_ragged_shapes(path: torch.device, batch: int, dim: int) -> None:
    check(path, make_inputs(batch, dim), 20.0)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("sides", ["both", "rows"])
@pytest.mark.parametrize("bias", [False, True])
def test_positives_sides_and_bias(path: torch.device, positives: str, sides: str, bias: bool) -> None:
    image, text, options = make_inputs(70, 24, positives, keys=70 if sides == "both" else 81, bias=bias)
    check(path, (image, text, {**options, "sides": sides}), 20.0)


@pytest.mark.parametrize("scale", [1.0, 14.0, 50.0, 100.0, 117.0])
@pytest.mark.parametrize("kind", ["random", "aligned", "opposed"])
def test_scales(path: torch.device, scale: float, kind: str) -> None:
    image, text, options = make_inputs(67, 64)
    if kind == "aligned":  # in training: the positive is among the largest
        text = F.normalize(0.4 * image + text, dim=-1)
    if kind == "opposed":  # every cosine near -1: exp(scale * cosine) without a shift is 0 in fp32
        text = F.normalize(-image.mean(0) + 0.01 * text, dim=-1)
        image = F.normalize(image.mean(0) + 0.01 * image, dim=-1)
        assert (image @ text.T).max() < -0.5
    check(path, (image, text, options), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(path: torch.device, dtype: torch.dtype) -> None:
    image, text, options = make_inputs(70, 40, "soft")
    check(path, (image, text, options), 50.0, dtype)


def test_several_tiles_and_panels(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_statistics, "_TILE", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(contrastive_kernels, "_PANEL", 2)
    check(path, make_inputs(135, 16, "soft", bias=True), 20.0)
    check(path, make_inputs(135, 16, "mask"), 20.0)


def test_strided_features(path: torch.device) -> None:
    image, text, options = make_inputs(21, 16)
    wide = torch.zeros(21, 40)
    wide[:, 3:19] = image
    check(path, (wide[:, 3:19], text.T.contiguous().T, options), 20.0)


def test_repeats_bit_by_bit(path: torch.device) -> None:
    image, text, options = to_path(make_inputs(150, 32, "soft", bias=True), path)
    first, second = (value_and_grads(contrastive_loss, image, text, 50.0, options) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_inputs_are_left_alone(path: torch.device) -> None:
    image, text, options = to_path(make_inputs(20, 16, "mask", bias=True), path)
    before = [x.clone() for x in (image, text, *options.values()) if isinstance(x, Tensor)]
    copies = (image.clone(), text.clone(), dict(options))
    value_and_grads(contrastive_loss, image, text, 20.0, options)
    after = [x for x in (image, text, *options.values()) if isinstance(x, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(copies[0], image)


# --- Options ----------------------------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    image, text, options = make_inputs(6, 5, "soft", bias=True)
    bias = options.pop("bias").double().requires_grad_()
    leaves = [x.double().requires_grad_() for x in (image, text, torch.tensor(3.0))]
    assert torch.autograd.gradcheck(lambda i, t, s, b: contrastive_loss(i, t, s, bias=b, **options), (*leaves, bias))


def test_scale_as_number_or_scalar_tensor() -> None:
    image, text, _ = make_inputs(6, 8)
    expected = contrastive_loss(image, text, torch.tensor([12.0]))
    for scale in (12, 12.0, torch.tensor(12.0), torch.tensor(12.0, dtype=torch.float64)):
        found = contrastive_loss(image, text, scale)
        assert found.shape == ()
        assert found.dtype == torch.float32
        assert found == expected


def test_only_requested_gradients() -> None:
    image, text, _ = make_inputs(6, 8)
    text.requires_grad_()
    contrastive_loss(image, text, 5.0).backward()
    assert text.grad is not None
    keys = text.detach().clone().requires_grad_()
    loss = contrastive_loss(image.requires_grad_(), keys, 5.0, sides="rows")
    loss.backward()
    assert keys.grad is None
    with torch.no_grad():
        assert not contrastive_loss(image, text, 5.0).requires_grad


def test_autocast_does_not_round() -> None:
    image, text, _ = make_inputs(40, 16)
    expected = value_and_grads(contrastive_loss, image, text, 100.0, {})
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_grads(contrastive_loss, image, text, 100.0, {})
        reference = contrastive_loss_reference(image, text, 100.0)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    torch.testing.assert_close(reference, expected["loss"])


class LargestOutput(TorchDispatchMode):
    """Notes the largest number of elements any operator returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                # A view of size 0 strides (expand) holds fewer elements than it shows.
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch, positives: str) -> None:
    """No operator, forward or backward, returns more than max(B D, tile^2) elements, a 40th of B x B."""
    monkeypatch.setattr(contrastive_statistics, "_TILE", {"cpu": 64})
    batch, dim = 600, 8
    image, text, options = make_inputs(batch, dim, positives)
    image.requires_grad_()
    with LargestOutput() as mode:
        contrastive_loss(image, text, 20.0, **options).backward()
    assert 0 < mode.largest <= max(batch * dim, 64 * 64)
    with LargestOutput() as mode:
        contrastive_loss_reference(image, text, 20.0, **options)
    assert mode.largest >= batch * batch  # the measure sees what it should


# --- PyTorch integration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", POSITIVES[:3])
def test_opcheck(path: torch.device, positives: str) -> None:
    image, text, options = to_path(make_inputs(9, 8, positives, bias=True), path)
    columns = positives != "mask"
    ids = (options.get("image_ids"), options.get("text_ids"))
    mode = {"soft": "share"}.get(positives, positives)
    weights = contrastive_statistics.positive_weights(
        image, text, None if ids[0] is None else (ids[0], *ids), 0, mode, columns
    )
    scale = torch.tensor([5.0], device=path)
    leaves = [x.detach().requires_grad_() for x in (image, text, scale, options["bias"])]
    torch.library.opcheck(contrastive_statistics.logit_statistics, (*leaves, *ids, *weights, 0, mode, columns))
    statistics = contrastive_statistics.logit_statistics(image, text, scale, None, *ids, *weights, 0, mode, columns)
    torch.library.opcheck(
        contrastive_statistics.logit_gradients,
        (image, text, scale, None, *ids, *weights, *statistics[:2], *statistics[:2], statistics[2], 0, mode, columns),
    )


@pytest.mark.parametrize("positives", ["diagonal", "soft"])
def test_compiles_without_graph_breaks(positives: str) -> None:
    image, text, options = make_inputs(10, 8, positives, bias=True)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    expected = value_and_grads(contrastive_loss, image, text, 5.0, options)
    found = value_and_grads(compiled, image, text, 5.0, options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


# --- Errors -----------------------------------------------------------------------------------------------------------

ONES = torch.ones(3, 4)
IDS = torch.arange(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": torch.ones(3, 5)}, r"\(3, 5\).*\(3, 4\)"),
        ({"image_features": torch.ones(4)}, r"\(4,\)"),
        ({"image_features": torch.ones(2, 4)}, "equally many rows"),
        ({"image_features": torch.ones(4, 4), "sides": "rows"}, "at least as many"),
        ({"image_features": torch.ones(0, 4), "text_features": torch.ones(0, 4)}, "no pair"),
        ({"image_features": ONES.half()}, "float16.*float32"),
        ({"image_features": IDS[:, None], "text_features": IDS[:, None]}, "floating dtype"),
        ({"logit_scale": torch.ones(2)}, r"\(2,\)"),
        ({"logit_scale": math.inf}, "inf is not finite"),
        ({"logit_scale": torch.tensor(math.nan)}, "nan is not finite"),
        ({"bias": torch.ones(4)}, r"bias \(4,\)"),
        ({"positives": "hard"}, "'hard'"),
        ({"sides": "columns"}, "'columns'"),
        ({"positives": "soft"}, "pass image_ids"),
        ({"image_ids": IDS}, "'diagonal' does not use ids"),
        ({"image_ids": IDS[:2], "positives": "mask"}, r"image_ids \(2,\)"),
        ({"image_ids": IDS, "text_ids": IDS.float(), "positives": "mask"}, "text_ids.*float32"),
        ({"text_features": ONES.to("meta")}, "cpu.*meta"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], message: str) -> None:
    arguments = {"image_features": ONES, "text_features": ONES, "logit_scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)
