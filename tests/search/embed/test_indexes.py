"""Which index for how many rows."""

import pytest

from eclip.search.embed.indexes import VectorIndex, plan, sub_vectors


def test_few_rows_are_looked_at_one_by_one() -> None:
    assert plan(50_000, 384, "auto", "float32") == VectorIndex("flat")
    many = plan(1_000_000, 384, "auto", "float32")
    assert (many.kind, many.partitions, many.sub_vectors) == ("ivf_pq", 1000, 48)
    assert 0 < many.nprobes < many.partitions and many.refine > 1
    assert plan(1_000_000, 384, "flat", "float32").kind == "flat"


def test_int8_is_an_index_of_a_byte_a_number() -> None:
    assert plan(1000, 384, "auto", "int8").kind == "ivf_sq"
    assert plan(100, 384, "auto", "int8").kind == "flat"  # too few to learn the range of each number from


def test_too_few_rows_to_learn_from_are_told() -> None:
    with pytest.raises(ValueError, match="--index ivf_pq: 100 rows, and it learns from at least 256; use --index flat"):
        plan(100, 384, "ivf_pq", "float32")


@pytest.mark.parametrize("dim, count", [(384, 48), (32, 4), (4, 1), (7, 1), (100, 10), (768, 96)])
def test_sub_vectors_divide_a_vector(dim: int, count: int) -> None:
    assert sub_vectors(dim) == count


def test_an_index_is_read_back_from_its_record() -> None:
    index = plan(1_000_000, 384, "auto", "float32")
    assert VectorIndex.of_record({"index": index.facts()}) == index
