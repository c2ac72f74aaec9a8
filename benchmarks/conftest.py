"""The `bench` fixture; see harness/bench.py."""

from benchmarks.harness.bench import (  # noqa: F401
    _flush,
    bench,
    pytest_benchmark_update_json,
    pytest_benchmark_update_machine_info,
    pytest_collection_modifyitems,
    pytest_runtest_call,
    roofline,
)
