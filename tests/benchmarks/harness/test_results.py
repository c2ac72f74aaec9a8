"""What is read of pytest's files."""

from pathlib import Path

from benchmarks.harness.results import not_measured


def test_many_skipped_for_one_reason_are_counted(tmp_path: Path) -> None:
    cases = "".join(f'<testcase name="t{i}"><skipped message="not installed"/></testcase>' for i in range(5))
    (tmp_path / "x.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert not_measured(tmp_path / "x.xml") == ["x: skipped (not installed): `t0`, `t1`, `t2`, and 2 more"]
