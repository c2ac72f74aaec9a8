"""The first pages in another order: by the head alone, with the cosine, with instances decoded for the question."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eclip.evaluate.tasks.reranking as reranking
from eclip.evaluate.tasks.reranking import Stage, by_photos, by_words
from tests.evaluate.made_features import make_features

AXES = torch.eye(4)


class SecondAxis:
    """A head that believes in the product of the second axis alone, and a decoder that gives back the prompt."""

    def match(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(len(features)), features[:, 1]], dim=-1)

    def scale(self) -> torch.Tensor:
        return torch.tensor(100.0)

    def instance_queries(self, prompt: torch.Tensor, modality: int) -> torch.Tensor:
        return prompt[:, None]

    def decode_queries(self, tokens: torch.Tensor, queries: torch.Tensor) -> SimpleNamespace:
        assert tokens.dtype == torch.float32
        return SimpleNamespace(slots=queries)


EVALUATOR = SimpleNamespace(model=SecondAxis(), device=torch.device("cpu"))


def test_a_stage_keeps_the_first_and_ties_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reranking, "DEPTH", 3)
    pages = F.normalize(torch.tensor([[1.0, 0], [1, 1], [1, 2], [0, 1]]), dim=-1)
    stage = Stage.of(pages[:1], pages, np.array([2]))
    assert stage.found.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(stage.cosine, (pages[:1] @ pages[:3].T))
    assert stage.reordered(torch.tensor([[0.0, 5.0, 5.0]])).tolist() == [[1, 2, 0]]


def test_the_head_alone_and_with_the_cosine() -> None:
    """The words lean to the first page, and the head to the second, which is right."""
    words = F.normalize(torch.tensor([[1.0, 0.9, 0, 0]]), dim=-1)
    asked = make_features(AXES[:1], words, AXES[:1], products=(1,), sources=("customer",))
    pages = make_features(AXES[:3], AXES[:3], AXES[:3], products=(0, 1, 2))
    table = by_words(EVALUATOR, asked, pages)  # type: ignore[arg-type]
    scores = {name: row["mAP@1"] for name, row in table.rows.items()}
    assert scores["instance (title), not reranked"] == 0 and scores["head, stored instance"] == 1
    assert scores["head, stored instance + cosine"] == 0  # at a scale of 100
    assert scores["chance, of these 50"] == scores["chance"] == pytest.approx(1 / 3)


def test_instances_decoded_for_the_question() -> None:
    """The decoder answers with the prompt: whatever is asked about matches it."""
    photo = F.normalize(torch.tensor([[1.0, 0.9, 0, 0]]), dim=-1)
    tokens = {row: torch.zeros(2, 4).half() for row in range(3)}
    asked = dataclasses.replace(make_features(photo, AXES[[1]], photo, products=(1,)), tokens=tokens)
    pages = make_features(AXES[:3], AXES[:3], AXES[:3], products=(0, 1, 2))
    pages = dataclasses.replace(pages, tokens=tokens, instance_text=AXES[[3, 1, 3]])
    table = by_photos(EVALUATOR, asked, pages, decode=True)  # type: ignore[arg-type]
    scores = {name: row["mAP@1"] for name, row in table.rows.items()}
    assert scores["instance (image), not reranked"] == 0 and scores["head, photo prompted by the title"] == 1
    assert scores["cosine, photo prompted by the title"] == 1  # page 1 alone is like its title
    assert scores["cosine, photo prompted by the title + cosine"] == 1
    table = by_words(EVALUATOR, asked, pages, decode=True)  # type: ignore[arg-type]
    assert "head, page prompted by the words + cosine" in table.rows
