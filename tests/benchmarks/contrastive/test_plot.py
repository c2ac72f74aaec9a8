"""The plot of the contrastive loss's rows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contrastive import plot
from benchmarks.contrastive.goals import FORWARD, SHARP
from benchmarks.contrastive.providers import PROVIDERS
from tests.benchmarks.contrastive.rows import row


def some_lines(**columns: Any) -> list[dict[str, Any]]:
    rows = [row("ours", n**2 * 1e-9, f"B={n} D=512", **columns) for n in (2**15, 2**12, 2**20)]
    rows += [row("eager", n**2 * 1e-8, f"B={n} D=512", **columns) for n in (2**12, 2**15)]
    return [*rows, row("ours", 1.0, SHARP), row("ours", 1.0, "B=32768 D=768"), row("ours", 1.0, op=FORWARD)]


def test_lines_ascend_and_hold_one_setting() -> None:
    found = plot.lines(some_lines())
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
    plot.main()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_row_no_plot(tmp_path: Path) -> None:
    assert not plot.draw([row("ours", 1.0, op="slot_attention")], {}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_every_provider_has_a_style() -> None:
    assert plot.STYLES.keys() == PROVIDERS.keys()
    assert len(set(plot.STYLES.values())) == len(PROVIDERS)
