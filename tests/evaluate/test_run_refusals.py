"""What an evaluation refuses, leaves out, or does without; by the catalogue of colours of test_run.py."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eclip.evaluate.run as run_module
from eclip.dataloading.errors import DataError
from eclip.dataloading.pipeline import decode_square
from eclip.evaluate.run import evaluate_run
from eclip.files import CannotWrite
from eclip.training.feature_cache.file import CannotStore
from tests.evaluate.test_run import SIZE, Catalogue, Colours, prepare


def _refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Colours) -> str:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    kept = run_module.load_run(run, "cpu")
    monkeypatch.setattr(run_module, "load_run", lambda run_dir, device: (model, *kept[1:]))
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


def test_a_temperature_that_is_not_finite_costs_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    monkeypatch.setattr(Colours, "scale", lambda self: torch.tensor(math.nan))
    result = evaluate_run(run, progress=False)
    assert "image_text_loss" not in result["tables"] and "not finite" in result["skipped"]["image_text_loss"]

    def constant(name: str) -> float:
        raise AssertionError(f"{name} in the JSON")

    json.loads((run / "evaluation.json").read_text(encoding="utf-8"), parse_constant=constant)


def test_boxes_without_area_are_no_grounding_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A centre prior of no width would be NaN; a NaN box has no overlap."""
    catalogue = Catalogue()
    bad = [(5, 5, 5, 40), (0, 0, math.nan, 9), (9, 9, 2, 2), (0, 0, math.inf, 9)]
    for p, product in enumerate(catalogue.products):
        images = []
        for image in product.images:
            own = image.instances[0]
            seen = (replace(own, box=bad[p]), own) if p < len(bad) else (own, replace(own, box=bad[p - len(bad)]))
            images.append(replace(image, instances=seen))
        catalogue.products[p] = replace(product, images=tuple(images))
    result = evaluate_run(prepare(tmp_path, monkeypatch, catalogue, catalogue), progress=False)
    assert result["tables"]["grounding"]["counts"] == {"images": 4}
    assert "undefined" not in result["tables"]["grounding"]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_smallest_split_has_no_undefined_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    result = evaluate_run(prepare(tmp_path, monkeypatch, Catalogue(), None), progress=False, limit=limit)
    assert not [name for name, table in result["tables"].items() if "undefined" in table]


def test_images_that_a_cache_has_a_stand_in_for_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The features in that place are another image's."""
    bad = {4: "truncated", 7: "no JPEG"}

    class Cache:
        @classmethod
        def build_or_open(cls, cache_dir: Path, model: Colours, index: Catalogue, *rest: object, **options: object):
            stand_in = [row - 1 if row in bad else row for row in range(index.num_images)]
            outputs = model.image_tower(torch.stack([decode_square(index.read_image(row), SIZE) for row in stand_in]))
            return SimpleNamespace(tower_outputs=lambda rows: outputs[torch.from_numpy(rows)], undecodable=bad)

    run = prepare(tmp_path, monkeypatch, Catalogue(), None, locked=True)
    monkeypatch.setattr(run_module, "FeatureCache", Cache)
    result = evaluate_run(run, batch_size=1, progress=False)
    assert result["images"] == 16 and result["corrupt"] == ["lime/001.jpg: truncated", "blue/001.jpg: no JPEG"]
    assert "left out, not decodable: lime/001.jpg: truncated" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_done_without_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        @classmethod
        def build_or_open(cls, *rest: object, **options: object) -> None:
            raise CannotStore("images.npy: No space left on device")

    direct = evaluate_run(prepare(tmp_path, monkeypatch, Catalogue(), Catalogue()), progress=False)
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue(), locked=True)
    monkeypatch.setattr(run_module, "FeatureCache", Full)
    assert evaluate_run(run, progress=False)["tables"] == direct["tables"]
    assert "not cached, computed for this evaluation alone: images.npy" in capsys.readouterr().out
    with pytest.raises(CannotStore):
        evaluate_run(run, progress=False, cache_dir=tmp_path / "cache")


def test_tables_are_printed_before_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    evaluate_run(run, progress=False)
    before = (run / "evaluation.json").read_bytes()
    capsys.readouterr()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"evaluation.json: cannot be written \(No space left on device"):
        evaluate_run(run, progress=False, threshold=0.2)
    assert "product retrieval, same product" in capsys.readouterr().out
    assert (run / "evaluation.json").read_bytes() == before
    assert not list(run.glob("*.partial"))


def test_a_reader_of_the_tables_that_leaves_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())

    def gone(*arguments: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(run_module, "_print_tables", gone)
    with pytest.raises(BrokenPipeError):
        evaluate_run(run, progress=False)
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["tables"]
