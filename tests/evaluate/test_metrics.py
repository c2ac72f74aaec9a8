"""Metric functions against hand-made cases, and chance formulas against the mean over all rankings."""

import itertools
import math

import numpy as np
import pytest
import torch

from eclip.evaluate.metrics import (
    average_precision,
    chance_scores,
    count_positives,
    expected_average_precision,
    expected_hit,
    hit_at,
    ranking_scores,
    retrieval_scores,
    shuffled_scores,
    top_matches,
)


@pytest.mark.parametrize(
    ("ranking", "positives", "k", "expected"),
    [
        ("1000", 1, 10, 1.0),
        ("0100", 1, 10, 0.0),  # one positive: only rank 1 counts
        ("0100", 2, 10, 1 / 2),  # one hit in the first two ranks, at rank 2
        ("1010", 3, 10, (1 + 2 / 3) / 2),
        ("1010", 3, 2, 1.0),
        ("0110", 5, 3, (1 / 2 + 2 / 3) / 2),
        ("0000", 5, 3, 0.0),
        ("1111", 9, 10, 1.0),  # fewer ranked than wanted
    ],
)
def test_average_precision_by_hand(ranking: str, positives: int, k: int, expected: float) -> None:
    hits = np.array([[c == "1" for c in ranking]])
    assert average_precision(hits, np.array([positives]), k)[0] == pytest.approx(expected)


def test_average_precision_is_product1ms_scoring() -> None:
    """The published script's loop, written out once more."""

    def script(ranked: list[int], positive: set[int], k: int) -> float:
        topk = min(k, len(positive), len(ranked))
        hits, total = 0, 0.0
        for rank in range(topk):
            if ranked[rank] in positive:
                hits += 1
                total += hits / (rank + 1)
        return total / hits if hits else 0.0

    rng = np.random.default_rng(0)
    for _ in range(100):
        size = int(rng.integers(1, 15))
        ranked = [int(i) for i in rng.permutation(size)]
        positive = set(int(i) for i in rng.choice(size, int(rng.integers(1, size + 1)), replace=False))
        hits = np.array([[i in positive for i in ranked]])
        for k in (1, 3, 10):
            assert average_precision(hits, np.array([len(positive)]), k)[0] == pytest.approx(
                script(ranked, positive, k)
            )


@pytest.mark.parametrize(("positives", "gallery"), [(1, 4), (2, 5), (3, 6), (6, 6), (4, 7)])
@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_chance_is_the_mean_over_all_rankings(positives: int, gallery: int, k: int) -> None:
    hits = np.array(
        [[p in places for p in range(gallery)] for places in itertools.combinations(range(gallery), positives)]
    )
    count = np.full(len(hits), positives)
    assert expected_average_precision(positives, gallery, k) == pytest.approx(average_precision(hits, count, k).mean())
    assert expected_hit(positives, gallery, k) == pytest.approx(hit_at(hits, k).mean())


def test_chance_of_an_order_of_what_was_found_is_the_mean_over_all_orders() -> None:
    """The second query's third page was not found: it counts among its positives all the same. The third has none."""
    gallery, queries = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 7])
    found = np.array([[0, 1, 2, 5], [2, 3, 0, 5], [0, 1, 2, 3]])
    orders = [ranking_scores(found[:, order], queries, gallery, average=True) for order in map(list, _orders(4))]
    expected = {metric: np.mean([scores[metric] for scores in orders]) for metric in orders[0]}
    assert shuffled_scores(found, queries, gallery) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no query has a match"):
        shuffled_scores(found[2:], queries[2:], gallery)


def _orders(count: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(count)))


def test_chance_of_a_large_gallery_is_finite() -> None:
    assert expected_average_precision(400, 100_000, 10) == pytest.approx(0.0117, abs=5e-4)
    assert expected_hit(400, 100_000, 10) == pytest.approx(1 - 0.996**10, rel=1e-3)


def test_top_matches_equals_a_full_sort_in_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(7, 8, generator=generator), torch.randn(20, 8, generator=generator)
    expected = (queries @ gallery.T).argsort(dim=1, descending=True)[:, :5].numpy()
    np.testing.assert_array_equal(top_matches(queries, gallery, 5, chunk=3), expected)
    assert top_matches(queries, gallery, 99).shape == (7, 20)


def test_constant_embeddings_score_as_chance() -> None:
    """A collapsed model must not profit from the order of the gallery."""
    labels = np.repeat(np.arange(40), 10)
    same = torch.ones(400, 4)
    scores = retrieval_scores(same[:40], same, labels[::10], labels, average=True)
    chance = chance_scores(labels[::10], labels, average=True)
    # All queries share one ranking: its first k items belong to at most k of the 40 products.
    assert scores["R@1"] == pytest.approx(1 / 40) == pytest.approx(chance["R@1"])
    assert scores["mAP@10"] < 0.15


def test_perfect_embeddings_score_one_and_unanswerable_queries_are_left_out() -> None:
    eye = torch.eye(4)
    scores = retrieval_scores(eye, eye[:3].repeat(5, 1), np.arange(4), np.tile(np.arange(3), 5), average=True)
    assert set(scores.values()) == {1.0}
    assert list(scores) == ["mAP@1", "mAP@5", "mAP@10", "R@1", "R@5", "R@10"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_a_row_that_is_not_finite_is_refused(side: str, bad: float) -> None:
    """Ranked, one NaN stands first for every query: mAP@1 of the others goes from 1.0 to 0.1."""
    queries, gallery = torch.eye(4), torch.eye(4)
    (queries if side == "query" else gallery)[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 4 (queries|gallery) are not finite"):
        retrieval_scores(queries, gallery, np.arange(4), np.arange(4), average=True)
    with pytest.raises(ValueError, match="not finite"):
        top_matches(queries, gallery, 3)


def test_scores_without_a_positive_are_refused_instead_of_nan() -> None:
    eye, nobody, empty = torch.eye(3), np.full(3, 9), np.array([], dtype=np.int64)
    for query_labels, queries in ((np.arange(3), eye), (empty, eye[:0])):
        with pytest.raises(ValueError, match="no query has a match"):
            retrieval_scores(queries, eye, query_labels, nobody, average=True)
        with pytest.raises(ValueError, match="no query has a match"):
            chance_scores(query_labels, nobody, average=False)
    with pytest.raises(ValueError, match="no query has a match"):
        retrieval_scores(eye, eye[:0], np.arange(3), empty, average=True)


def test_count_positives() -> None:
    np.testing.assert_array_equal(count_positives(np.array([5, 1, 9]), np.array([1, 5, 5, 2])), [2, 1, 0])
    np.testing.assert_array_equal(count_positives(np.array([5]), np.array([], dtype=np.int64)), [0])
