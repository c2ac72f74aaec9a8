"""Rows of all ranks come in rank order and carry no gradient."""

import torch

from eclip.parallel.gather import gather_rows
from tests.helpers import run_torchrun

RANKS = """
import torch
from eclip.parallel.gather import gather_rows
from eclip.parallel.ranks import find_ranks, part, start_ranks

ranks = start_ranks(find_ranks(timeout=60))
rows = torch.full((2, 3), float(ranks.rank), requires_grad=True)
gathered = gather_rows(rows.T.contiguous().T, ranks.group)  # not contiguous
assert not gathered.requires_grad
assert gathered[:, 0].tolist() == [0, 0, 1, 1], gathered
ids = gather_rows(torch.tensor([7 + ranks.rank]), ranks.group)
assert ids.dtype == torch.int64 and ids.tolist() == [7, 8]
part(ranks)
print(f"rank {ranks.rank} done", flush=True)
"""


def test_alone() -> None:
    rows = torch.randn(2, 3, requires_grad=True)
    gathered = gather_rows(rows, None)
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad


def test_two_ranks() -> None:
    output = run_torchrun(RANKS)
    assert "rank 0 done" in output
    assert "rank 1 done" in output
