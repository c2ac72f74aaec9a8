"""Shards of a session: each test in exactly one."""

from types import SimpleNamespace

import pytest

from benchmarks.harness import shard


def test_shards_divide_the_tests() -> None:
    found: list[int] = []
    for index in range(1, 4):
        items, left_out = list(range(10)), []
        config = SimpleNamespace(
            getoption=lambda name, index=index: f"{index}/3",
            hook=SimpleNamespace(pytest_deselected=lambda items, out=left_out: out.extend(items)),
        )
        shard.pytest_collection_modifyitems(config, items)
        assert sorted(items + left_out) == list(range(10))
        found += items
    assert sorted(found) == list(range(10))


def test_a_shard_outside_the_count_is_refused() -> None:
    config = SimpleNamespace(getoption=lambda name: "4/3")
    with pytest.raises(pytest.UsageError, match="4/3"):
        shard.pytest_collection_modifyitems(config, [])
