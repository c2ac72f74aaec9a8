"""Where an evaluation's image features come from: the tower, or a cache of its outputs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eclip.evaluate.evaluator as evaluator_module
from eclip.dataloading.pipeline import decode_square
from eclip.evaluate.run import evaluate_run
from eclip.training.feature_cache.file import CannotStore
from tests.evaluate.colours import SIZE, Catalogue, Colours, prepare


def test_cached_tower_outputs_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Cache:
        @classmethod
        def build_or_open(cls, cache_dir: Path, model: Colours, index: Catalogue, *rest: object, **options: object):
            asked.append(cache_dir)
            images = torch.stack([decode_square(index.read_image(row), SIZE) for row in range(index.num_images)])
            outputs = model.image_tower(images)
            return SimpleNamespace(tower_outputs=lambda rows: outputs[torch.from_numpy(rows)], undecodable={})

    direct = evaluate_run(prepare(tmp_path, monkeypatch, Catalogue(), Catalogue()), progress=False)
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue(), locked=True)
    monkeypatch.setattr(evaluator_module, "FeatureCache", Cache)
    cached = evaluate_run(run, batch_size=4, progress=False)
    assert asked == [tmp_path / "features"] * 2
    assert cached["tables"] == direct["tables"]


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
    monkeypatch.setattr(evaluator_module, "FeatureCache", Cache)
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
    monkeypatch.setattr(evaluator_module, "FeatureCache", Full)
    assert evaluate_run(run, progress=False)["tables"] == direct["tables"]
    assert "not cached, computed for this evaluation alone: images.npy" in capsys.readouterr().out
    with pytest.raises(CannotStore):
        evaluate_run(run, progress=False, cache_dir=tmp_path / "cache")
