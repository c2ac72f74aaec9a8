"""Who runs here: providers of a CPU against the reference, and the adapters of packages by stand-ins for these."""

import importlib
import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contrastive import bench_contrastive_loss as bench_file
from benchmarks.contrastive.bench_contrastive_loss import Case
from benchmarks.contrastive.goals import BOTH
from benchmarks.contrastive.providers import PROVIDERS
from eclip.kernels.contrastive import contrastive_loss_reference
from tests.benchmarks.contrastive.problem import assert_same


@pytest.mark.parametrize("name", ["eager", "cublas blocks", "open_clip", "reference", "ours"])
def test_providers_that_run_on_a_cpu(name: str) -> None:
    provider = PROVIDERS[name]
    if reason := provider.missing():
        pytest.skip(reason)
    assert_same(provider.load(), None)


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


def test_peers_without_a_record_are_measured_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert PROVIDERS["memeff"].version() is None and PROVIDERS["eager"].version() is None


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = {name: provider.missing() for name, provider in PROVIDERS.items()}
    assert {name for name, reason in reasons.items() if reason is None} == {
        name for name, provider in PROVIDERS.items() if provider.package is None
    }
    assert reasons["open_clip"] == "open_clip_torch is not installed"
    with pytest.raises(pytest.skip.Exception, match="memeff is not installed"):
        bench_file.skip_unless_it_fits(Case("4k", 512, 50.0, BOTH, "memeff"), PROVIDERS["memeff"])
