"""The tests' own tools: the tolerance, and running ranks."""

import sys

import pytest
import torch

from tests.helpers import assert_as_accurate, our_files, run_command, run_torchrun

ALL_REDUCE = """
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
x = torch.full((2,), float(dist.get_rank() + 1))
dist.all_reduce(x)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {x.tolist()} {torch.get_num_threads()} {sys.argv[1]}")
dist.destroy_process_group()
"""


def test_tolerance_follows_the_error_of_plain_pytorch() -> None:
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    low = (exact * 1.01).float()
    assert_as_accurate((exact * 1.015).float(), low, exact)
    with pytest.raises(AssertionError, match=r"gradient: relative error 3.*e-02"):
        assert_as_accurate((exact * 1.03).float(), low, exact, name="gradient")


def test_tolerance_rejects_nan_and_other_shapes() -> None:
    exact = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_as_accurate(torch.tensor([0.0, float("nan")]), exact.float(), exact)
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate(torch.zeros(1), exact.float(), exact)


def test_run_torchrun_runs_source_text_on_two_ranks() -> None:
    output = run_torchrun(ALL_REDUCE, "argument")
    for rank in (0, 1):
        assert f"rank {rank} of 2: [3.0, 3.0] 1 argument" in output


def test_failure_shows_the_output_and_timeout_ends_the_process() -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit code 3.*the reason"):
        run_command([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"])
    with pytest.raises(AssertionError, match=r"(?s)exit code none after 1 s.*still here"):
        run_command([sys.executable, "-c", "import time; print('still here', flush=True); time.sleep(60)"], timeout=1)


def test_our_files_are_found_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    known = our_files(".py", ".md")
    monkeypatch.setenv("PATH", "")
    found = our_files(".py", ".md")
    assert set(known) <= set(found)
    assert not [file for file in found if file.parts[:2] in (("eclip", "kernels"), ("eclip", "dataloading"))]
