"""Sinks and rates."""

import dataclasses
import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

from eclip.metrics import (
    Throughput,
    build_sinks,
    check_packages,
    console_sink,
    count_flops,
    format_count,
    format_duration,
    format_rate,
    jsonl_sink,
)
from eclip.presets import PRESETS


def test_console_line(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "loss": 2.1341, "grad_norm": 0.412, "learning_rate": 4.9e-4, "pairs_per_second": 31234.0, "mfu": 0.412,
        "data_seconds": 0.0021, "memory_gib": 61.2, "eta_seconds": 3725.0, "itc": 1.0,
    }  # fmt: skip
    sink = console_sink(20000)
    sink(1200, values)
    assert capsys.readouterr().out == (
        "step 1200/20000 | loss 2.134 | grad 0.41 | lr 4.9e-4 | 31.2k pairs/s | mfu 41% | data 2 ms | mem 61 GiB | "
        "eta 1h02m\n"
    )
    sink(1, {"loss": 1.0, "memory_gib": 0.84, "eta_seconds": 61.0})
    assert capsys.readouterr().out == "step 1/20000 | loss 1.000 | mem 0.8 GiB | eta 1m01s\n"


@pytest.mark.parametrize(("value", "text"), [(31234, "31.2k"), (87.4, "87"), (4.25, "4.2")])
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


def test_rates_and_durations() -> None:
    assert [format_rate(v) for v in (4.9e-4, 1.0, 0.0)] == ["4.9e-4", "1.0e0", "0.0e0"]
    assert [format_duration(v) for v in (3599.7, 200, 45, 0)] == ["1h00m", "3m20s", "45s", "0s"]


def test_jsonl_keeps_what_a_checkpoint_covers(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write = jsonl_sink(path)
    for step in (1, 2, 3):
        write(step, {"loss": 1 / 3 + step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    jsonl_sink(path, start_step=2)(3, {"loss": 0.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1 / 3 + 1}, {"step": 2, "loss": 1 / 3 + 2}, {"step": 3, "loss": 0.5}]


def test_throughput() -> None:
    throughput = Throughput(total_steps=10, start_step=2, pairs_per_step=8, device=torch.device("cpu"))
    with throughput.waiting():
        time.sleep(0.02)
    values = throughput.report(4)
    seconds = 8 / values["pairs_per_second"]
    assert 0.01 <= values["data_seconds"] <= seconds
    assert values["eta_seconds"] == pytest.approx(6 * seconds)
    assert 0.01 < values["memory_gib"] < 1000
    assert "mfu" not in values  # no peak is known for a CPU
    assert throughput.report(5)["data_seconds"] == 0


def test_mfu_from_counted_flops() -> None:
    throughput = Throughput(total_steps=2, start_step=0, pairs_per_step=1, device=torch.device("cpu"))
    throughput.peak_flops = 1e12
    assert throughput.wants_flops
    weight = torch.randn(16, 32, requires_grad=True)
    with count_flops(throughput):
        (torch.randn(8, 16) @ weight).sum().backward()
    assert throughput.flops_per_step == 2 * 2 * 8 * 16 * 32  # the product and its gradient for the weight
    assert not throughput.wants_flops
    values = throughput.report(1)
    assert values["mfu"] == pytest.approx(throughput.flops_per_step * values["pairs_per_second"] / 1e12)


def test_sinks_of_a_run(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["debug"], run_dir=tmp_path)
    assert len(build_sinks(config)) == 2
    check_packages(config)


@pytest.mark.parametrize(("package", "change"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "shop"})])
def test_a_sink_without_its_package_is_refused(package: str, change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    with pytest.raises(ValueError, match=f"pip install {package}"):
        check_packages(dataclasses.replace(PRESETS["debug"], **change))
