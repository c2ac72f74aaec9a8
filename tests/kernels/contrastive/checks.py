"""What the tests of the contrastive losses share: inputs, gradients by name, measures of accuracy and memory."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eclip.kernels.contrastive import contrastive_loss, contrastive_loss_reference
from eclip.kernels.contrastive.ops import pair_gradients, pair_statistics
from eclip.kernels.contrastive.plain import plain_gradients
from eclip.kernels.contrastive.problem import Logits, Wanted, magnitudes, positive_weights, safe_shift
from tests.helpers import assert_as_accurate

Arguments = dict[str, Any]
"""Keyword arguments of a loss; its floating tensors are what gradients are taken of."""


def make_ids(kind: str, rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids of both sides, far from 0. Where `cols` is larger, the first `rows` texts are paired with the images."""
    if kind == "clusters":  # of about three
        ids = torch.randint(max(1, rows // 3), (cols,), generator=generator)
    elif kind == "one":
        ids = torch.zeros(cols, dtype=torch.int64)
    else:
        assert kind in ("distinct", "crossed")
        ids = torch.randperm(cols, generator=generator)
    text_ids = ids - (1 << 40)
    image_ids = text_ids[:rows].clone()
    if kind == "crossed":  # the ids of a pair differ, those of a neighbour in the batch agree
        image_ids[::2] = image_ids[::2].roll(1)
    return {"image_ids": image_ids, "text_ids": text_ids}


def make_arguments(
    batch: int,
    dim: int,
    positives: str = "diagonal",
    *,
    scale: float = 20.0,
    keys: int | None = None,
    ids: str = "clusters",
    bias: bool = False,
    seed: int = 0,
) -> Arguments:
    """Arguments of `contrastive_loss`: normalised features (batch, dim) and (keys, dim) in fp32."""
    generator = torch.Generator().manual_seed(seed)
    keys = batch if keys is None else keys
    image, text = (F.normalize(torch.randn(n, dim, generator=generator), dim=-1) for n in (batch, keys))
    arguments: Arguments = {"image_features": image, "text_features": text, "logit_scale": torch.tensor([scale])}
    if positives != "diagonal":
        arguments |= make_ids(ids, batch, keys, generator)
    if bias:
        arguments["bias"] = torch.randn(keys, generator=generator)
    return arguments | {"positives": positives}


def opposed(batch: int, dim: int, **options: Any) -> Arguments:
    """All cosines near -1: at scale 117 every exp(s - shift) is 0 in fp32."""
    arguments = make_arguments(batch, dim, scale=117.0, **options)
    image, text = arguments["image_features"], arguments["text_features"]
    centre = image.mean(0)
    arguments["image_features"] = F.normalize(centre + 0.05 * image, dim=-1)
    arguments["text_features"] = F.normalize(-centre + 0.05 * text, dim=-1)
    return arguments


def on(device: torch.device, arguments: Arguments) -> Arguments:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def with_features(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same with features in `dtype`; scale and biases stay as they are."""
    return {name: x.to(dtype) if name.endswith("features") else x for name, x in arguments.items()}


def value_and_grads(
    loss: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Loss and the gradient of every floating argument that has one, all of them first cast to `dtype`."""
    leaves = {
        name: x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    value = loss(**{**arguments, **leaves})
    value.backward()
    return {"loss": value.detach(), **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


def check(
    loss: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    arguments: Arguments,
    *,
    roundings: int = 1,
    **options: Any,
) -> None:
    """`loss` is as accurate as the reference on the same inputs, in value and every gradient; options: of `loss` alone.

    Allowed in any case: 8 units in the last place of a logit, |s| <= scale + |bias|, which is the relative error of
    exp(s). The loss and d(scale), whose terms are of order |s| and 1, may cancel to nothing: there the error is
    absolute, or 2 units in the last place of the result. With half-precision features the matrix of gradients is
    rounded as they are, so many times, before it is multiplied.
    """
    ours = value_and_grads(lambda **given: loss(**given, **options), arguments)
    low = value_and_grads(reference, arguments)
    exact = value_and_grads(reference, arguments, torch.float64)
    assert ours.keys() == exact.keys()
    dtype = arguments["image_features"].dtype
    scale, *biases = (arguments[n].abs().max().item() for n in ("logit_scale", "bias", "logit_bias") if n in arguments)
    floor = 8 * torch.finfo(torch.float32).eps * max(1.0, scale + sum(biases))
    for name in ours:
        size = exact[name].abs().max().item()
        allowed = floor
        if name != "loss" and dtype in (torch.float16, torch.bfloat16):
            allowed = max(allowed, roundings * torch.finfo(dtype).eps / 2)
        if name in ("loss", "logit_scale") or size < 1e-12:  # of one pair all gradients are 0
            order = scale if name.endswith("features") else 1
            allowed *= order / max(size, torch.finfo(torch.float32).tiny)
            allowed = max(allowed, 2 * torch.finfo(torch.float32).eps)
        assert_as_accurate(ours[name], low[name], exact[name], floor=allowed, name=name)


def check_contrastive(arguments: Arguments, **options: Any) -> None:
    check(contrastive_loss, contrastive_loss_reference, arguments, **options)


def gradients(logits: Logits, row_stat: Tensor, col_stat: Tensor, factor: float) -> tuple[Tensor, ...]:
    """Of images, texts, scale and bias, by the op."""
    shift, offset, sides, positives = logits[-4:]
    factor_ = torch.tensor(factor, device=shift.device)
    wanted = (True, True, True, logits.bias is not None)
    return pair_gradients(*logits[:-4], row_stat, col_stat, shift, None, factor_, offset, sides, positives, *wanted)


def exact_gradients(logits: Logits, row_stat: Tensor, col_stat: Tensor, factor: float) -> tuple[Tensor, ...]:
    """The same in float64, by PyTorch."""
    statistics = row_stat.double(), col_stat.double(), torch.tensor(factor, device=row_stat.device).double()
    return plain_gradients(in_float64(logits), *statistics, Wanted(True, True, True, logits.bias is not None))


def in_float64(logits: Logits) -> Logits:
    return Logits._make(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in logits)


def statistics(arguments: Arguments, sides: str = "both") -> tuple[Tensor, ...]:
    """row_stat, col_stat and shift of diagonal positives."""
    image, text, scale = (arguments[name] for name in ("image_features", "text_features", "logit_scale"))
    weights = positive_weights(image, len(text), None, 0, sides, "diagonal")
    shift = safe_shift(magnitudes(image, text, None), scale, sides)
    logits = Logits(image, text, scale, None, None, None, *weights, shift, 0, sides, "diagonal")
    rows, cols, _ = pair_statistics(logits, None)
    return rows, cols, shift


def peak_bytes(function: Callable[[], object]) -> int:
    """The most CPU memory that tensors made by `function` held at once, as PyTorch's allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is given back
        peak = max(peak, held)
    return peak


class Ignore(torch.autograd.Function):
    """A function that says that it needs no gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None
