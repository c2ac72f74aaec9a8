"""What the contrastive benchmark compares with: adapters against the reference, the float64 result, what is skipped."""

import functools
import importlib
import importlib.metadata
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contrastive import bench_contrastive_loss as bench_file
from benchmarks.contrastive import blocks as contrastive_blocks
from benchmarks.contrastive.bench_contrastive_loss import Case
from benchmarks.contrastive.exact import exact_loss
from benchmarks.contrastive.goals import BOTH, FORWARD, HUGE, LARGE, SHAPE, SHARP, label
from benchmarks.contrastive.providers import PROVIDERS, eager_fixed_keys, eager_soft
from eclip.kernels.contrastive import contrastive_loss_reference

B, D = 24, 16
IDS = torch.arange(B) * 2 // 3


def problem(scale: float = 20.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return image, text, torch.tensor(scale, dtype=torch.float64)


def value_and_gradients(loss: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


def assert_same(loss: Any, expected: Any, **options: Any) -> None:
    inputs = problem()
    reference = functools.partial(contrastive_loss_reference, **options) if expected is None else expected
    torch.testing.assert_close(value_and_gradients(loss, *inputs), value_and_gradients(reference, *inputs))


# --- Providers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "cublas blocks", "open_clip", "reference", "ours"])
def test_providers_that_run_on_a_cpu(name: str) -> None:
    provider = PROVIDERS[name]
    if reason := provider.missing():
        pytest.skip(reason)
    assert_same(provider.load(), None)


def test_blocks_that_do_not_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_blocks, "SIDE", 10)
    for scale in (5.0, 117.0):  # with and without a shift
        inputs = problem(scale)
        expected = value_and_gradients(contrastive_loss_reference, *inputs)
        torch.testing.assert_close(value_and_gradients(contrastive_blocks.blocks, *inputs), expected)


def test_eager_with_ids() -> None:
    assert_same(functools.partial(eager_soft, ids=IDS), None, image_ids=IDS, positives="soft")
    fixed = {"image_ids": IDS, "positives": "mask", "sides": "rows"}
    assert_same(functools.partial(eager_fixed_keys, ids=IDS), None, **fixed)


# Stand-ins with the signatures of the packages' functions, as far as the adapters use them.


def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, *, filter_eps: float | str | None = "high") -> Tensor:
    assert filter_eps is None
    return F.cross_entropy(e @ c.T, targets)


def liger_fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, *, accum_dtype: torch.dtype | None = None
) -> Tensor:
    assert accum_dtype is torch.float32
    return F.cross_entropy(input @ weight.T, target)


def chunked_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, target)


def cal_flash_loss(q: Tensor, k: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * q @ k.T, labels, reduction="none")


class MemoryEfficientCLIPLoss:
    def __init__(self, temperature: float = 0.07, normalized_inputs: bool = False, stable: bool = True) -> None:
        assert normalized_inputs and not stable
        self.scale = 1 / temperature

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        return contrastive_loss_reference(image, text, self.scale)


STAND_INS = {
    "inf-cl": ("inf_cl", cal_flash_loss),
    "cut-cross-entropy": ("cut_cross_entropy", linear_cross_entropy),
    "liger": ("liger_kernel.transformers.functional", liger_fused_linear_cross_entropy),
    "quack": ("quack.linear_cross_entropy", chunked_linear_cross_entropy),
    "memeff": ("memeff", MemoryEfficientCLIPLoss),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_adapters_compute_the_two_sided_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function = STAND_INS[name]
    monkeypatch.setattr(importlib, "import_module", {module: SimpleNamespace(**{function.__name__: function})}.get)
    loss = PROVIDERS[name].load()
    if PROVIDERS[name].scale_gradient:
        assert_same(loss, None)
    else:
        assert_same(lambda i, t, s: loss(i, t, s.item()), lambda i, t, s: contrastive_loss_reference(i, t, s.item()))


# --- float64 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", ["diagonal", "soft", "mask"])
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_exact_loss_is_the_reference_in_float64(positives: Any, sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.contrastive.exact.BLOCK", 7 * B)
    image, text, scale = problem(100.0)
    ids = None if positives == "diagonal" else IDS
    sample = torch.tensor([0, 5, 23])
    found = exact_loss(image, text, scale.item(), sample, ids=ids, positives=positives, both=sides == "both")
    options = {} if ids is None else {"image_ids": ids}
    reference = functools.partial(contrastive_loss_reference, positives=positives, sides=sides, **options)
    value, grad_image, grad_text, grad_scale = value_and_gradients(reference, image, text, scale)
    torch.testing.assert_close(found.loss, value)
    torch.testing.assert_close(found.image, grad_image[sample])
    torch.testing.assert_close(found.scale, grad_scale)
    if sides == "both":
        torch.testing.assert_close(found.text, grad_text[sample])


# --- What runs --------------------------------------------------------------------------------------------------------


def test_cases_cover_the_goals_and_have_names_of_their_own() -> None:
    cases = [*bench_file.cases(), *(c for c in bench_file.by_size() if c.size in bench_file.LAST)]
    assert len(set(cases)) == len(cases) == len(set(map(str, cases)))
    ours = {label(bench_file.SIZES[c.size], c.dim, c.scale) for c in cases if c.provider == "ours" and c.op == BOTH}
    assert {SHAPE, SHARP, LARGE, HUGE} <= ours
    for name in PROVIDERS:
        plain = [bench_file.SIZES[c.size] for c in cases if c.provider == name and c[1:4] == (512, 50.0, BOTH)]
        assert plain == sorted(plain) and 2**15 in plain


def test_judged_rows_run_before_the_largest() -> None:
    """Of a part that runs out of time the last rows are missing."""
    first = [str(case) for case in bench_file.cases()]
    assert not any(size in name for size in bench_file.LAST for name in first)
    judged = [i for i, c in enumerate(bench_file.cases()) if label(bench_file.SIZES[c.size], c.dim, c.scale) == SHARP]
    large = [i for i, case in enumerate(bench_file.cases()) if case.size == "131k"]
    assert len(judged) == len(PROVIDERS) - 1 and max(judged) < min(large)
    names = [name for name in vars(bench_file) if name.startswith("test_")]
    assert names == ["test_loss", "test_ids", "test_largest"]  # pytest runs a file's tests as they stand in it


def test_forward_rows_take_the_float64_result_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(bench_file, "exact_loss", lambda *args, **options: calls.append(args) or object())
    bench_file.exact.cache_clear()
    try:
        found = [bench_file.exact("4k", 512, 50.0, op) for op in (FORWARD, BOTH)]
    finally:
        bench_file.exact.cache_clear()
    assert found[0] is found[1] and len(calls) == 1


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'cutlass'"), ImportError(), OSError("libcudart.so.13: cannot open\nmore")],
)
def test_packages_that_lack_another_are_skipped(error: Exception) -> None:
    def fail() -> Any:
        raise error

    with pytest.raises(pytest.skip.Exception, match="quack-kernels cannot be imported: "):
        bench_file.load(PROVIDERS["quack"]._replace(load=fail))
    with pytest.raises(type(error)):  # our own mistakes are none of theirs
        bench_file.load(PROVIDERS["eager"]._replace(load=fail))


def test_peers_without_a_record_are_measured_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert PROVIDERS["memeff"].version() is None and PROVIDERS["eager"].version() is None


@pytest.mark.parametrize("name", ["eager", "liger", "cut-cross-entropy", "quack"])
def test_peers_that_synchronise_are_timed_without_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []

    class Recorder:
        device, seconds = torch.device("cpu"), None

        def __call__(self, call: Any, **columns: Any) -> Any:
            rows.append(columns)
            return call()

    bench_file.timed(Recorder(), lambda: 1, Case("4k", 512, 50.0, FORWARD, name))
    assert rows[0]["graph"] == (name not in ("liger", "cut-cross-entropy"))


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = {name: provider.missing() for name, provider in PROVIDERS.items()}
    assert {name for name, reason in reasons.items() if reason is None} == {
        name for name, provider in PROVIDERS.items() if provider.package is None
    }
    assert reasons["open_clip"] == "open_clip_torch is not installed"
    with pytest.raises(pytest.skip.Exception, match="memeff is not installed"):
        bench_file.skip_unless_it_fits(Case("4k", 512, 50.0, BOTH, "memeff"), PROVIDERS["memeff"])


def test_rows_that_would_not_fit_are_skipped_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_file, "ON_GPU", True)
    monkeypatch.setattr(bench_file, "SHRINK", 1)
    monkeypatch.setattr(bench_file, "measured", {("cublas blocks", BOTH): (2**17, 0.3), ("ours", BOTH): (2**18, 0.5)})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 10**9, 80 * 10**9))

    def try_case(size: str, name: str) -> None:
        bench_file.skip_unless_it_fits(Case(size, 512, 50.0, BOTH, name), PROVIDERS[name])

    try_case("65k", "eager")
    with pytest.raises(pytest.skip.Exception, match="eager would hold 275 GB of B x B matrices, 80 GB are free"):
        try_case("131k", "eager")
    with pytest.raises(
        pytest.skip.Exception, match=r"cublas blocks would take 1.2 s a call: it took 0.30 s for 131072"
    ):
        try_case("262k", "cublas blocks")
    try_case("1M", "ours")
