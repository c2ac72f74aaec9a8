"""The count of bytes between ranks."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.contrastive import goals
from benchmarks.contrastive.traffic import Traffic
from tests.helpers import run_command


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_bytes_are_those_of_a_ring() -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    x = torch.ones(8)  # 32 bytes; as if on 4 ranks
    with Traffic(4) as traffic:
        dist.all_reduce(x)
        gather(torch.empty(8), x)
        dist.all_gather([torch.empty(8)], x)
        reduce_scatter(torch.empty(8), x)
        dist.all_to_all_single(torch.empty(8), x)
        dist.scatter(torch.empty(8), [x])
    assert traffic.sent == {
        "allreduce": 48.0,
        "allgather_base": 96.0,
        "allgather": 96.0,
        "reduce_scatter_base": 24.0,
        "alltoall_base": 24.0,
        "scatter": 24.0,
    }
    with pytest.raises(ValueError, match="broadcast is not counted"), Traffic(4):
        dist.broadcast(x, 0)


def test_two_ranks_send_half_of_what_open_clip_sends(tmp_path: Path) -> None:
    """Half in the features' dtype, and a few numbers a pair."""
    file = tmp_path / "traffic.json"
    command = [sys.executable, "-m", "benchmarks.contrastive.traffic", "--json", str(file), "--batch", "64"]
    assert "bytes that a rank sends" in run_command(command)
    rows = [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]
    sent = {(row["provider"], row["dtype"]): row["sent_bytes"] for row in rows}
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        tower = 64 * 512 * size
        assert sent["open_clip", dtype] == 4 * tower
        assert 2 * tower <= sent["ours", dtype] <= 2 * tower + 64 * 40
    goal = goals.judge([row | {"seconds": 1.0} for row in rows], "cpu")
    assert [g.met for g in goal] == [True]
