"""What is made of the contrastive loss's rows: goals, the plot; and the count of bytes between ranks."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.contrastive import goals
from benchmarks.contrastive import plot as contrastive_plot
from benchmarks.contrastive.goals import BOTH, HUGE, LARGE, SHAPE, SHARP
from benchmarks.contrastive.traffic import Traffic
from tests.helpers import run_command


def row(provider: str, seconds: float, shape: str = SHAPE, op: str = BOTH, **columns: Any) -> dict[str, Any]:
    return {"op": op, "provider": provider, "shape": shape, "dtype": "bfloat16", "seconds": seconds, **columns}


def a_run() -> list[dict[str, Any]]:
    return [
        row("ours", 8e-3, share=0.7, rms_error=2e-3, peak_bytes=2 * 10**9),
        row("eager", 24e-3, rms_error=3e-2),
        row("open_clip", 15e-3, rms_error=4e-2),
        row("memeff", 16e-3, rms_error=2.5e-3),
        row("reference", 1e-3, rms_error=1e-5),  # float32 inside: no peer
        row("ours", 0.14, LARGE, peak_bytes=29 * 10**8),
        row("ours", 7.0, HUGE, peak_bytes=21 * 10**9),
        row("ours", 8e-3, SHARP, rms_error=3e-3),
        row("memeff", 8e-3, SHARP, rms_error=2e-3),
        row("inf-cl", 8e-3, SHARP, rms_error=math.nan),
        row("ours", 1.0, "2 ranks", goals.TRAFFIC, sent_bytes=505),
        row("open_clip", 1.0, "2 ranks", goals.TRAFFIC, sent_bytes=1000),
    ]


def test_goals_are_judged_from_the_rows() -> None:
    judged = goals.judge(a_run(), "NVIDIA H200")
    assert [(g.required, g.measured, g.met) for g in judged] == [
        ("<= 8.5", "8", True),
        ("<= 130", "140", False),
        (">= 65%", "70%", True),
        (">= 2", "3.00", True),
        (">= 2", "1.88", False),
        (">= 1", "1.88", True),
        ("<= 3", "2.90", True),
        ("<= 20", "21.00", False),
        ("<= 1", "0.800", True),
        ("<= 1", "1.500", False),
        ("<= 51%", "50.5%", True),
    ]
    assert "open_clip of 3" in judged[5].goal
    assert "memeff of 3" in judged[8].goal and "memeff of 2" in judged[9].goal


def test_milliseconds_are_judged_on_an_h200_alone() -> None:
    times = goals.judge(a_run(), "NVIDIA H100 80GB HBM3")[:3]
    assert [g.met for g in times] == [None, None, True]
    assert all("not judged here" in g.goal for g in times[:2])


def test_a_cpu_judges_the_traffic_alone() -> None:
    assert [g.measured for g in goals.judge(a_run(), "cpu")] == ["50.5%"]


def test_nothing_measured_nothing_judged() -> None:
    rows = [r | {"dtype": "float32"} for r in a_run()]
    for judged in (goals.judge([], "NVIDIA H200"), goals.judge(rows, "NVIDIA H200")):
        assert {g.measured for g in judged} == {"not measured"} and {g.met for g in judged} == {None}


# --- The plot ---------------------------------------------------------------------------------------------------------


def some_lines(**columns: Any) -> list[dict[str, Any]]:
    rows = [row("ours", n**2 * 1e-9, f"B={n} D=512", **columns) for n in (2**15, 2**12, 2**20)]
    rows += [row("eager", n**2 * 1e-8, f"B={n} D=512", **columns) for n in (2**12, 2**15)]
    return [*rows, row("ours", 1.0, SHARP), row("ours", 1.0, "B=32768 D=768"), row("ours", 1.0, op=goals.FORWARD)]


def test_lines_ascend_and_hold_one_setting() -> None:
    found = contrastive_plot.lines(some_lines())
    assert {name: [batch for batch, _ in points] for name, points in found.items()} == {
        "ours": [2**12, 2**15, 2**20],
        "eager": [2**12, 2**15],
    }


@pytest.mark.parametrize("device", ["cpu", "NVIDIA X"])
def test_plot_is_written(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rows = some_lines() if device == "cpu" else some_lines(peak_bytes=10**9)
    results, picture = tmp_path / "x.json", tmp_path / "x.png"
    results.write_text(json.dumps({"rows": rows, "machine": {"device": device, "torch": "2"}}))
    monkeypatch.setattr(sys, "argv", ["plot", str(results), "--out", str(picture)])
    contrastive_plot.main()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_row_no_plot(tmp_path: Path) -> None:
    assert not contrastive_plot.draw([row("ours", 1.0, op="slot_attention")], {}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_every_provider_has_a_style() -> None:
    from benchmarks.contrastive.providers import PROVIDERS

    assert contrastive_plot.STYLES.keys() == PROVIDERS.keys()
    assert len(set(contrastive_plot.STYLES.values())) == len(PROVIDERS)


# --- Bytes between ranks ----------------------------------------------------------------------------------------------


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
