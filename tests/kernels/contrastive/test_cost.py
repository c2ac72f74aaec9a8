"""What the contrastive losses leave out: products for frozen inputs, further sorts of ids, programs for a fallback."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eclip.kernels import launch
from eclip.kernels.contrastive import contrastive_loss, ranks, sigmoid_loss, triton_backward, triton_forward
from tests.kernels.contrastive.checks import (
    Arguments,
    Ignore,
    make_arguments,
    on,
    opposed,
    value_and_grads,
    with_features,
)

NAMES = ("image_features", "text_features", "logit_scale", "bias")


def only(arguments: Arguments, *wanted: str) -> Callable[..., Tensor]:
    """A loss of `arguments` that some of them want a gradient of."""
    loss = sigmoid_loss if "logit_bias" in arguments else contrastive_loss

    def of(**given: Any) -> Tensor:
        return loss(
            **{
                name: x.detach() if isinstance(x, Tensor) and x.is_floating_point() and name not in wanted else x
                for name, x in given.items()
            }
        )

    return of


def some_of(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One frozen, and one alone."""
    return [*(tuple(n for n in names if n != frozen) for frozen in names), *((name,) for name in names)]


# --- Frozen inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", some_of(NAMES), ids="+".join)
def test_gradients_of_some_are_those_of_all(path: torch.device, wanted: tuple[str, ...]) -> None:
    arguments = on(path, make_arguments(20, 24, "soft", bias=True))
    everything = value_and_grads(contrastive_loss, arguments)
    found = value_and_grads(only(arguments, *wanted), arguments)
    assert found.keys() == {"loss", *wanted}
    for name, value in found.items():
        if name == "logit_scale":  # a sum over the other tower's rows
            torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, everything[name]), name


@pytest.mark.parametrize("options", [{"sides": "rows"}, {"logit_bias": torch.tensor(-3.0)}], ids=["rows", "sigmoid"])
def test_frozen_towers_of_the_other_losses(path: torch.device, options: dict[str, Any]) -> None:
    arguments = on(path, {**make_arguments(20, 24, "mask"), **options})
    loss = functools.partial(sigmoid_loss if "logit_bias" in options else contrastive_loss)
    everything = value_and_grads(loss, arguments)
    for wanted in some_of(tuple(everything)[1:]):
        found = value_and_grads(only(arguments, *wanted), arguments)
        assert found.keys() == {"loss", *wanted}
        for name, value in found.items():
            torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_frozen_towers_in_half_precision(interpreter: torch.device, keep_bytes: int) -> None:
    arguments = with_features(make_arguments(20, 24, "soft", scale=50.0), torch.bfloat16) | {"keep_bytes": keep_bytes}
    everything = value_and_grads(contrastive_loss, arguments)
    for frozen in NAMES[:2]:
        wanted = [name for name in NAMES[:3] if name != frozen]
        found = value_and_grads(only(arguments, *wanted), arguments)
        assert found.keys() == {"loss", *wanted}
        for name, value in found.items():
            torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        (("image_features", "text_features", "logit_scale"), 2),
        (("image_features", "logit_scale"), 1),
        (("text_features", "logit_scale"), 1),
        (("image_features",), 1),
        (("text_features",), 1),
        (("logit_scale",), 1),
        (("bias",), 0),
    ],
)
def test_products_nobody_asked_for_are_left_out(
    path: torch.device, monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...], products: int
) -> None:
    """Of the block of logits' gradients with a tower: 1u of 4u each."""
    arguments = on(path, make_arguments(6, 8, bias=True))
    loss = only(arguments, *wanted)(**{n: x.requires_grad_() if n in NAMES else x for n, x in arguments.items()})
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss.backward()
    assert calls(profiler, "aten::addmm_") + calls(profiler, "aten::addmm") == products


def calls(profiler: profile, name: str) -> int:
    return sum(event.count for event in profiler.key_averages() if event.key == name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_frozen_towers_compile(device: str) -> None:
    arguments = on(torch.device(device), make_arguments(10, 8, "soft", scale=5.0))
    for frozen in NAMES[:2]:
        loss = only(arguments, *(name for name in NAMES[:3] if name != frozen))
        found = value_and_grads(torch.compile(loss, fullgraph=True, backend="aot_eager"), arguments)
        for name, value in value_and_grads(loss, arguments).items():
            torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("frozen", [*NAMES[:3], "nothing"])
def test_ranks_exchange_no_gradient_of_a_frozen_tower(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    """By one rank, which does all that several do."""
    sent = []
    exchange = dist.all_to_all_single
    monkeypatch.setattr(dist, "all_to_all_single", lambda *args, **rest: sent.append(args) or exchange(*args, **rest))
    arguments = make_arguments(12, 8, "soft")
    given = [arguments[name].requires_grad_(name != frozen) for name in NAMES[:3]]
    ids = arguments["image_ids"], arguments["text_ids"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rest = (None, *ids, "both", "all", dist.group.WORLD, None, 0)
        ranks._GroupShare.apply(*given, *rest).backward()
    finally:
        dist.destroy_process_group()
    assert len(sent) == (frozen != "text_features")
    found = {name: x.grad for name, x in zip(NAMES, given, strict=False) if x.grad is not None}
    expected = value_and_grads(contrastive_loss, arguments)
    assert found.keys() == expected.keys() - {"loss", frozen}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_share_without_a_gradient_is_exchanged_nevertheless() -> None:
    """The other ranks, which may have one, wait for it."""
    arguments = make_arguments(6, 8)
    given = [arguments[name].requires_grad_() for name in NAMES[:3]]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rest = (None, None, None, "both", "diagonal", dist.group.WORLD, None, 0)
        Ignore.apply(ranks._GroupShare.apply(*given, *rest)).backward()
    finally:
        dist.destroy_process_group()
    assert all(not x.grad.any() for x in given)


# --- Ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positives", "sorts"), [("diagonal", 0), ("mask", 1), ("soft", 2), ("supcon", 2)])
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_ids_are_sorted_once_a_side(path: torch.device, positives: str, sorts: int, sides: str) -> None:
    """Forward and backward together."""
    arguments = on(path, make_arguments(20, 24, positives)) | {"sides": sides}
    assert count_sorts(lambda: value_and_grads(contrastive_loss, arguments)) == sorts


@pytest.mark.parametrize(("positives", "sorts"), [("diagonal", 0), ("mask", 1), ("all", 2)])
@pytest.mark.parametrize("sides", ["both", "rows", "sigmoid"])
def test_ranks_sort_ids_once_a_side(sides: str, positives: str, sorts: int) -> None:
    """Of all ranks' rows and columns; blocks of columns that arrive are told by the same sorts."""
    arguments = make_arguments(20, 24, "diagonal" if positives == "diagonal" else "soft")
    given = [arguments[name].requires_grad_() for name in NAMES[:3]]
    ids = arguments.get("image_ids"), arguments.get("text_ids")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rest = (None, *ids, sides, positives, dist.group.WORLD, None, 0)
        assert count_sorts(lambda: ranks._GroupShare.apply(*given, *rest).backward()) == sorts
    finally:
        dist.destroy_process_group()


def count_sorts(function: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return calls(profiler, "aten::sort") + calls(profiler, "aten::argsort") + calls(profiler, "aten::unique")


# --- The fallback -----------------------------------------------------------------------------------------------------


def grids(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many programs were launched, by kernel and whether for the fallback."""
    launched: dict[str, list[int]] = {}

    def watch(module: Any, name: str) -> None:
        kernel = getattr(module, name)

        class Launcher:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launch(*args: Any, **options: Any) -> None:
                    fallback = options.get("ONLINE", False) or options.get("FORM") == "online"
                    programs = functools.reduce(int.__mul__, grid)
                    launched.setdefault(f"{name}{' online' * fallback}", []).append(programs)
                    kernel[grid](*args, **options)

                return launch

        monkeypatch.setattr(module, name, Launcher())

    watch(triton_forward, "_contrastive_fwd_kernel")
    watch(triton_forward, "_contrastive_sums_kernel")
    watch(triton_backward, "_contrastive_bwd_kernel")
    return launched


@pytest.mark.parametrize(
    ("make", "dtype"), [(make_arguments, torch.bfloat16), (opposed, torch.float32)], ids=["not needed", "needed"]
)
def test_programs_of_the_fallback_do_not_grow_with_the_batch(
    interpreter: torch.device, monkeypatch: pytest.MonkeyPatch, make: Any, dtype: torch.dtype
) -> None:
    """A few a multiprocessor, which go through all tiles, with the same bits however many they are."""
    monkeypatch.setattr(triton_forward, "_PROGRAMS", 1)
    arguments = with_features(make(100, 16, positives="mask"), dtype)
    results = []
    for multiprocessors in (1, 1000):
        monkeypatch.setattr(launch, "multiprocessors", lambda x, count=multiprocessors: count)
        with monkeypatch.context() as patch:
            launched = grids(patch)
            results.append(value_and_grads(contrastive_loss, arguments))
        fallbacks = {name: counts for name, counts in launched.items() if name.endswith("online")}
        assert len(fallbacks) == 3 and all(max(counts) <= 4 * multiprocessors for counts in fallbacks.values())
        if multiprocessors == 1 and dtype == torch.float32:
            assert max(launched["_contrastive_bwd_kernel"]) > 4  # so that there is something to go through
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
