"""Narrower vectors: what the rotation keeps, and that queries are turned as the rows were."""

import numpy as np

from eclip.search.embed.narrowing import Narrowing, choose, neighbours_kept, rotation_of, second_moment


def flat_vectors(n: int = 400, wide: int = 32, true: int = 6) -> np.ndarray:
    """Unit vectors of `true` directions, none of which is along an axis."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((wide, true)))[0]
    vectors = (rng.standard_normal((n, true)) @ directions.T).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_rotation_loses_nothing_where_there_is_nothing_to_lose() -> None:
    vectors = flat_vectors()
    moment = second_moment([vectors[:100], vectors[100:]])
    np.testing.assert_allclose(moment, vectors.T.astype(np.float64) @ vectors, atol=1e-4)
    turned = Narrowing(6, rotation_of(moment, 6))(vectors)
    np.testing.assert_allclose(turned @ turned.T, vectors @ vectors.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), 1, rtol=1e-6)


def test_what_loses_less_is_taken() -> None:
    vectors = flat_vectors()
    narrow, told = choose(second_moment([vectors]), vectors, 6)
    assert narrow.rotation is not None and "rotation 100.0%" in told and "taken: rotation" in told
    axes = np.zeros((400, 32), np.float32)
    axes[:, :6] = flat_vectors(wide=6)
    assert choose(second_moment([axes]), axes, 6)[0].rotation is None  # a tie: no rotation to store


def test_a_query_is_turned_as_the_index_was() -> None:
    vectors = flat_vectors()
    for narrow in (Narrowing(6), Narrowing(6, rotation_of(second_moment([vectors]), 6))):
        again = Narrowing.of_index({"dim": 6}, narrow.metadata())
        np.testing.assert_array_equal(again(vectors[:3]), narrow(vectors[:3]))


def test_a_vector_without_length_stays_finite() -> None:
    vectors = np.zeros((2, 8), np.float32)
    vectors[:, 7] = 1
    assert np.isfinite(Narrowing(4)(vectors)).all()


def test_one_vector_has_no_neighbours_to_lose() -> None:
    assert neighbours_kept(np.ones((1, 4), np.float32), Narrowing(2)) == 1.0
