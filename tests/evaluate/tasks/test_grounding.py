"""Grounding: which images are asked about, and where its thresholds come from."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from eclip.evaluate.run import evaluate_run
from tests.evaluate.colours import Catalogue, prepare


def test_without_val_split_the_threshold_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), None)
    table = evaluate_run(run, progress=False)["tables"]["grounding"]
    assert table["settings"]["thresholds"] == {"instance": 0.5, "global": 0.5} and "no val split" in table["note"]


def test_images_without_a_record_are_no_grounding_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue()
    catalogue.products = [replace(p, images=p.images[:2]) for p in catalogue.products]
    run = prepare(tmp_path, monkeypatch, catalogue, Catalogue())
    assert evaluate_run(run, progress=False)["tables"]["grounding"]["counts"] == {"images": 6}


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
