"""The held-out loss: against its formula, for constant embeddings, and with the run's own temperature."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eclip.evaluate.run import evaluate_run
from eclip.evaluate.tasks.image_text_loss import image_text_loss
from tests.evaluate.colours import Catalogue, Colours, prepare
from tests.evaluate.made_features import make_features

TITLES = (4, 7, 4, 9, 7)


def test_loss_of_each_embedding_is_its_cross_entropy_with_shared_titles() -> None:
    image, text, instance = F.normalize(torch.randn(3, 5, 8), dim=-1)
    scale = torch.tensor(12.0, requires_grad=True)
    table = image_text_loss(make_features(image, text, instance, titles=TITLES), scale)
    titles = torch.tensor(TITLES)
    label = (titles[:, None] == titles).float()
    label /= label.sum(1, keepdim=True)
    for name, embedding in (("global", image), ("instance", instance)):
        logits = 12 * embedding @ text.T
        expected = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
        assert table.rows[name]["nats"] == pytest.approx(expected.item(), rel=1e-5)
    assert table.rows["chance"]["nats"] == math.log(5)
    assert table.counts == {"images": 5} and table.unit == "nats"


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_temperature_that_is_not_finite_is_a_reason_for_no_table(scale: float) -> None:
    same = F.normalize(torch.ones(5, 8), dim=-1)
    assert image_text_loss(make_features(same, same, titles=TITLES), torch.tensor(scale)) == (
        f"the temperature that the run has learnt is not finite (scale {scale})"
    )


def test_constant_embeddings_have_the_loss_of_chance() -> None:
    same = F.normalize(torch.ones(5, 8), dim=-1)
    table = image_text_loss(make_features(same, same, titles=TITLES), torch.tensor(100.0))
    assert list(table.rows) == ["global", "chance"]
    assert table.rows["global"]["nats"] == pytest.approx(table.rows["chance"]["nats"], rel=1e-5)


def test_a_temperature_that_is_not_finite_costs_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    monkeypatch.setattr(Colours, "scale", lambda self: torch.tensor(math.nan))
    result = evaluate_run(run, progress=False)
    assert "image_text_loss" not in result["tables"] and "not finite" in result["skipped"]["image_text_loss"]

    def constant(name: str) -> float:
        raise AssertionError(f"{name} in the JSON")

    json.loads((run / "evaluation.json").read_text(encoding="utf-8"), parse_constant=constant)
