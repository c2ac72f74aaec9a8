"""Features that cannot be had: images that are corrupt, data at fault, models that are not finite."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eclip.evaluate.run as run_module
from eclip.dataloading.errors import DataError
from eclip.evaluate.run import evaluate_run
from tests.evaluate.colours import Catalogue, Colours, prepare


def test_corrupt_image_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(corrupt=4), Catalogue())
    result = evaluate_run(run, batch_size=1, progress=False, threshold=0.4)
    assert result["images"] == 17 and len(result["corrupt"]) == 1
    assert "lime/001.jpg" in capsys.readouterr().out
    assert result["tables"]["product_retrieval"]["counts"]["queries"] == 5
    assert result["tables"]["grounding"]["settings"]["thresholds"]["instance"] == 0.4


def _refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Colours) -> str:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    kept = run_module.load_run(run, "cpu")
    monkeypatch.setattr(run_module, "load_run", lambda run_dir, device, **which: (model, *kept[1:]))
    with pytest.raises(ValueError) as refusal:
        evaluate_run(run, batch_size=5, progress=False)
    assert not (run / "evaluation.json").exists() and not (run / "grounding.png").exists()
    return str(refusal.value)


class OneBadImage(Colours):
    """One token of the seventh image is `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.seen = value, 0

    def image_tower(self, images: torch.Tensor) -> torch.Tensor:
        features = super().image_tower(images).clone()
        if self.seen <= 6 < self.seen + len(images):
            features[6 - self.seen, 3, 0] = self.value
        self.seen += len(images)
        return features


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_image_that_is_not_finite_is_named_and_nothing_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    line = _refusal(tmp_path, monkeypatch, OneBadImage(value))
    assert line.startswith("1 of 18 images have features that are NaN or infinite (blue/000.jpg): the model overflows")
    assert "\n" not in line and "mAP" not in capsys.readouterr().out


def test_a_broken_checkpoint_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoImages(Colours):
        def project_image(self, tower: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(cls=tower[:, 0] * math.nan, tokens=tower[:, 1:] * math.nan)

    class NoDecoder(Colours):
        def instance_queries(self, prompt: torch.Tensor, modality: int) -> torch.Tensor:
            return super().instance_queries(prompt, modality) * math.nan

    class NoTexts(Colours):
        def encode_text(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
            return super().encode_text(tokens, cu_seqlens) * math.nan

    for model, start in (
        (NoImages(), " images have features that are NaN or infinite (red/000.jpg, red/001.jpg, "),
        (NoDecoder(), "18 of 18 images have features"),
        (NoTexts(), "6 of 6 texts have features that are NaN or infinite ('"),
    ):
        line = _refusal(tmp_path, monkeypatch, model)
        assert start in line and "the checkpoint is damaged or its training diverged" in line, line


def test_data_at_fault_ends_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no corrupt image; a val split that cannot be read is no missing one, whose thresholds are fixed."""

    def fail(*arguments: object) -> bytes:
        raise DataError("the tar was truncated")

    catalogue = Catalogue()
    monkeypatch.setattr(catalogue, "read_image", fail)
    with pytest.raises(DataError):
        evaluate_run(prepare(tmp_path, monkeypatch, catalogue, None), progress=False)
    run = prepare(tmp_path, monkeypatch, Catalogue(), None)
    (run / "val-000000.tar").touch()
    with pytest.raises(ValueError, match=r"no val-000000\.tar"):
        evaluate_run(run, progress=False)
    assert not (run / "evaluation.json").exists()
