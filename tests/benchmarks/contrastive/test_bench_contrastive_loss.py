"""What the contrastive benchmark runs, in which order, and what it skips."""

from typing import Any

import pytest
import torch

from benchmarks.contrastive import bench_contrastive_loss as bench_file
from benchmarks.contrastive.bench_contrastive_loss import Case
from benchmarks.contrastive.goals import BOTH, FORWARD, HUGE, LARGE, SHAPE, SHARP, label
from benchmarks.contrastive.providers import PROVIDERS


def test_cases_cover_the_goals_and_have_names_of_their_own() -> None:
    cases = [*bench_file.cases(), *(c for c in bench_file.by_size() if c.size in bench_file.LAST)]
    assert len(set(cases)) == len(cases) == len(set(map(str, cases)))
    ours = {label(bench_file.SIZES[c.size], c.dim, c.scale) for c in cases if c.provider == "ours" and c.op == BOTH}
    assert {SHAPE, SHARP, LARGE, HUGE} <= ours
    for name in PROVIDERS:
        plain = [bench_file.SIZES[c.size] for c in cases if c.provider == name and c[1:4] == (512, 50.0, BOTH)]
        assert plain == sorted(plain) and 2**15 in plain


def test_judged_rows_run_before_the_largest() -> None:
    """Of a part that runs out of time the last rows are missing."""
    first = [str(case) for case in bench_file.cases()]
    assert not any(size in name for size in bench_file.LAST for name in first)
    judged = [i for i, c in enumerate(bench_file.cases()) if label(bench_file.SIZES[c.size], c.dim, c.scale) == SHARP]
    large = [i for i, case in enumerate(bench_file.cases()) if case.size == "131k"]
    assert len(judged) == len(PROVIDERS) - 1 and max(judged) < min(large)
    names = [name for name in vars(bench_file) if name.startswith("test_")]
    assert names == ["test_loss", "test_ids", "test_largest"]  # pytest runs a file's tests as they stand in it


def test_forward_rows_take_the_float64_result_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(bench_file, "exact_loss", lambda *args, **options: calls.append(args) or object())
    bench_file.exact.cache_clear()
    try:
        found = [bench_file.exact("4k", 512, 50.0, op) for op in (FORWARD, BOTH)]
    finally:
        bench_file.exact.cache_clear()
    assert found[0] is found[1] and len(calls) == 1


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'cutlass'"), ImportError(), OSError("libcudart.so.13: cannot open\nmore")],
)
def test_packages_that_lack_another_are_skipped(error: Exception) -> None:
    def fail() -> Any:
        raise error

    with pytest.raises(pytest.skip.Exception, match="quack-kernels cannot be imported: "):
        bench_file.load(PROVIDERS["quack"]._replace(load=fail))
    with pytest.raises(type(error)):  # our own mistakes are none of theirs
        bench_file.load(PROVIDERS["eager"]._replace(load=fail))


@pytest.mark.parametrize("name", ["eager", "liger", "cut-cross-entropy", "quack"])
def test_peers_that_synchronise_are_timed_without_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []

    class Recorder:
        device, seconds = torch.device("cpu"), None

        def __call__(self, call: Any, **columns: Any) -> Any:
            rows.append(columns)
            return call()

    bench_file.timed(Recorder(), lambda: 1, Case("4k", 512, 50.0, FORWARD, name))
    assert rows[0]["graph"] == (name not in ("liger", "cut-cross-entropy"))


def test_rows_that_would_not_fit_are_skipped_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_file, "ON_GPU", True)
    monkeypatch.setattr(bench_file, "SHRINK", 1)
    monkeypatch.setattr(bench_file, "measured", {("cublas blocks", BOTH): (2**17, 0.3), ("ours", BOTH): (2**18, 0.5)})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 10**9, 80 * 10**9))

    def try_case(size: str, name: str) -> None:
        bench_file.skip_unless_it_fits(Case(size, 512, 50.0, BOTH, name), PROVIDERS[name])

    try_case("65k", "eager")
    with pytest.raises(pytest.skip.Exception, match="eager would hold 275 GB of B x B matrices, 80 GB are free"):
        try_case("131k", "eager")
    with pytest.raises(
        pytest.skip.Exception, match=r"cublas blocks would take 1.2 s a call: it took 0.30 s for 131072"
    ):
        try_case("262k", "cublas blocks")
    try_case("1M", "ours")
