"""How often a call is timed."""

from benchmarks.harness.clock import rounds_for


def test_slow_calls_get_fewer_rounds() -> None:
    assert [rounds_for(seconds) for seconds in (1e-6, 0.05, 0.2, 7.0)] == [30, 30, 10, 3]
