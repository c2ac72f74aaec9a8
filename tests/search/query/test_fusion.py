"""Rankings folded and fused."""

import pytest

from eclip.search.query.fusion import Candidate, fold, fuse


def test_the_first_image_of_a_product_stays() -> None:
    ranking = [Candidate(4, "a", 0.9), Candidate(2, "b", 0.8), Candidate(1, "a", 0.7)]
    assert fold(ranking) == ranking[:2]


def test_reciprocal_ranks_are_added() -> None:
    first = [Candidate(4, "a", 0.9), Candidate(2, "b", 0.8)]
    second = [Candidate(9, "b", 7.0), Candidate(5, "c", 6.0)]
    fused = fuse(first, second, by_product=True)
    assert [(c.row, c.product) for c in fused] == [(2, "b"), (4, "a"), (5, "c")]
    assert fused[0].score == pytest.approx(1 / 62 + 1 / 61)
    assert [c.row for c in fuse(first, second, by_product=False)] == [4, 9, 2, 5]
