"""Steps as calls: each provider's, on the path that a GPU takes, with a small model; no wait between log lines."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.train_step.batches import make_parts, pad
from benchmarks.train_step.open_clip_step import OpenClipStep
from benchmarks.train_step.steps import OurStep, make_step
from eclip.config import RunConfig
from eclip.parallel.settings import ComputeConfig
from tests.benchmarks.train_step.small import CPU, SMALL, cached
from tests.host_waits import no_host_waits


def with_compute(config: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(config, compute=dataclasses.replace(ComputeConfig(), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [SMALL, cached(SMALL)], ids=["towers", "cached"])
def test_ours_and_the_reference_take_the_same_step(config: RunConfig, device: torch.device) -> None:
    config = dataclasses.replace(config, bf16=False)
    ours, reference = (make_step(name, config, device) for name in ("ours", "reference"))
    for _ in range(3):
        mine, theirs = ours(), reference()
        assert mine["loss"].item() == pytest.approx(theirs["loss"].item(), rel=2e-4)


def test_micro_batches_take_the_same_step() -> None:
    whole, split = (make_step("ours", dataclasses.replace(SMALL, micro_batch=m), CPU) for m in (None, 4))
    # Pixels and titles are drawn a part: other data, so losses are alike and not the same.
    for _ in range(3):
        assert whole()["loss"].item() == pytest.approx(split()["loss"].item(), rel=0.2)


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_recomputed_blocks_change_nothing(mode: str) -> None:
    kept, again = (make_step("ours", with_compute(SMALL, activation_checkpointing=m), CPU) for m in ("none", mode))
    for _ in range(3):
        assert kept()["loss"].item() == pytest.approx(again()["loss"].item(), rel=1e-6)


def test_parts_hold_the_rows_of_the_batch_in_order() -> None:
    parts = make_parts(dataclasses.replace(SMALL, micro_batch=4), CPU)
    assert [len(part.batch.product_ids) for part in parts] == [4, 4, 4]
    assert torch.cat([part.batch.product_ids for part in parts]).tolist() == list(range(12))
    assert [part.draws.first for part in parts] == [0, 4, 8]
    (whole,) = make_parts(SMALL, CPU)
    assert whole.draws.prompts is not None
    rows = [part.draws.prompts.products for part in parts if part.draws.prompts is not None]
    assert torch.equal(torch.cat(rows), whole.draws.prompts.products)


def test_a_micro_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch=5 does not divide global_batch_size=12"):
        make_parts(dataclasses.replace(SMALL, micro_batch=5), CPU)


def test_padding_holds_the_same_titles() -> None:
    (part,) = make_parts(SMALL, CPU)
    padded = pad(part)
    assert padded.attention_mask.sum().item() == len(part.batch.tokens)
    assert torch.equal(padded.input_ids[padded.attention_mask.bool()], part.batch.tokens)
    first = part.batch.tokens[: int(part.batch.cu_seqlens[1])]
    assert torch.equal(padded.input_ids[0, 0, : len(first)], first)


def test_a_provider_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of ours, reference, plain, open_clip"):
        make_step("theirs", SMALL, CPU)


def test_a_peer_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for provider in ("plain", "open_clip"):
        with pytest.raises(ImportError):
            make_step(provider, SMALL, CPU)


def test_open_clip_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of its signatures: create_model, and a model whose call gives features and the scale."""
    monkeypatch.setitem(sys.modules, "open_clip", _StandIn())  # type: ignore[arg-type]
    step = OpenClipStep(SMALL, CPU, image_size=8)
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < losses[0]


class _StandIn:
    """open_clip 2 and 3, as far as a step uses it."""

    class ClipLoss(torch.nn.Module):
        def forward(self, image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor):  # type: ignore[no-untyped-def]
            logits = logit_scale * image_features @ text_features.T
            rows = torch.arange(len(logits))
            cross_entropy = torch.nn.functional.cross_entropy
            return (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 2

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = torch.nn.Linear(3 * 64, 8), torch.nn.Embedding(49408, 8)
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.66))

        def forward(self, image: torch.Tensor, text: torch.Tensor):  # type: ignore[no-untyped-def]
            unit = torch.nn.functional.normalize
            return unit(self.image(image.flatten(1))), unit(self.text(text).mean(1)), self.logit_scale.exp()

    def create_model(self, name: str, *, pretrained: str | None, device: torch.device) -> torch.nn.Module:
        assert (name, pretrained) == ("ViT-B-16", None)
        return self.Model().to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("config", [SMALL, cached(SMALL)], ids=["towers", "cached"])
def test_steps_between_log_lines_do_not_wait_for_the_gpu(config: RunConfig, micro_batch: int | None) -> None:
    """torch.cuda.set_sync_debug_mode("error") around whole steps: forward, backward, clip, optimizer, momentum."""
    device = torch.device("cuda")
    config = dataclasses.replace(config, micro_batch=micro_batch)
    step, parts = OurStep(config, device), make_parts(config, device)
    for _ in range(3):  # compiles kernels, and fills the numbers in flight
        losses = step(parts)
    torch.cuda.synchronize()
    with no_host_waits(device):
        for _ in range(6):
            losses = step(parts)
    assert all(value.isfinite().item() for value in losses.values())
    assert step.optimizer.state[step.trained[0]]["step"].item() == 9
