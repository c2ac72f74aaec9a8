"""Sinks: what they write, and that nothing half-written stays."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eclip.files import CannotWrite
from eclip.presets import PRESETS
from eclip.training.metrics.sinks import (
    build_sinks,
    check_packages,
    console_sink,
    format_count,
    format_duration,
    format_rate,
    jsonl_sink,
)
from tests.helpers import file_size_limit


def test_console_line(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "itc": 1.0214, "intra": 0.31, "entropy": 0.02, "loss": 2.1341, "logit_scale": 14.286, "positive_share": 0.0612,
        "grad_norm": 0.412, "grad_norm/decoder": 0.3, "learning_rate": 4.9e-4, "pairs_per_second": 31234.0,
        "mfu": 0.412, "data_seconds": 0.0021, "memory_gib": 61.2, "eta_seconds": 3725.0, "skipped_steps": 2,
    }  # fmt: skip
    sink = console_sink(20000)
    sink(1200, values)
    assert capsys.readouterr().out == (
        "step 1200/20000 | loss 2.134 (itc 1.021 intra 0.310 entropy 0.020) | scale 14.3 | positive 6% | grad 0.41 | "
        "lr 4.9e-4 | 31.2k pairs/s | mfu 41% | data 2 ms | mem 61 GiB | eta 1h02m | skipped 2\n"
    )
    sink(1, {"loss": 1.0, "memory_gib": 0.84, "eta_seconds": 61.0})
    assert capsys.readouterr().out == "step 1/20000 | loss 1.000 | mem 0.8 GiB | eta 1m01s\n"
    sink(2, {"itc": 0.5, "grad_norm": 0.1, "eta_seconds": 0.0})  # a skipped step has no loss
    assert capsys.readouterr().out == "step 2/20000 | grad 0.10 | eta 0s\n"


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


@pytest.mark.parametrize(
    "odd", [b'{"step": 4, "lo', b"\n\n", b"\xff\xfe\n", b"[1]\n", b"4\n", b'{"loss": 1}\n', b'{"step": "x"}\n']
)
def test_jsonl_lines_that_are_none_go(tmp_path: Path, odd: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "title": "\xe6\xb2\x99"}\n' + odd)
    jsonl_sink(path, start_step=5)(6, {"loss": 0.5})
    text = path.read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write = jsonl_sink(path)
    write(1, {"loss": 0.5})
    before = path.read_bytes()
    with (
        file_size_limit(len(before) + 9),
        pytest.raises(CannotWrite, match=r"metrics\.jsonl: cannot be written \(File too large; "),
    ):
        write(2, {"loss": 0.25})
    assert path.read_bytes() == before
    write(2, {"loss": 0.25})
    assert [line["step"] for line in map(json.loads, path.read_text().splitlines())] == [1, 2]


def test_a_rewrite_that_fails_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write = jsonl_sink(path)
    for step in (1, 2, 3):
        write(step, {"loss": 0.5})
    before = path.read_bytes()
    with file_size_limit(10), pytest.raises(CannotWrite, match=r"metrics\.jsonl: cannot be written"):
        jsonl_sink(path, start_step=2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


class _Wandb:
    """The surface of the package: what `init` was asked for, and ids that it makes."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def init(self, **options: Any) -> Any:
        self.calls.append(options)
        run_id = options["id"] or f"new{len(self.calls)}"
        return SimpleNamespace(id=run_id, log=lambda values, step: self.logged.append((step, values)))


def test_wandb_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = dataclasses.replace(PRESETS["debug"], run_dir=tmp_path, wandb="shop")
    build_sinks(config)[-1](3, {"loss": 0.5})
    assert fake.logged == [(3, {"loss": 0.5})]
    build_sinks(config, start_step=3)
    build_sinks(dataclasses.replace(config, wandb="other"), start_step=3)  # ids are those of a project
    (tmp_path / "wandb.json").unlink()  # as --overwrite does
    build_sinks(config)
    (tmp_path / "wandb.json").write_text("no JSON")
    build_sinks(config)
    assert [call["id"] for call in fake.calls] == [None, "new1", None, None, None]
    assert {call["resume"] for call in fake.calls} == {"allow"}
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"project": "shop", "id": "new5"}


def test_wandb_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> Any:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = dataclasses.replace(PRESETS["debug"], run_dir=tmp_path, wandb="shop")
    with pytest.raises(ValueError, match=r"^--wandb shop: api_key not configured \(no-tty\); set WANDB_MODE=offline"):
        build_sinks(config)


@pytest.mark.parametrize(("start", "purge"), [(0, None), (10, 11)])
def test_tensorboard_purges_what_a_dead_run_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, purge: int | None
) -> None:
    made = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            made.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            made.append((name, value, step))

        def flush(self) -> None:
            made.append("flushed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    config = dataclasses.replace(PRESETS["debug"], run_dir=tmp_path, tensorboard=True)
    build_sinks(config, start_step=start)[-1](12, {"loss": 0.5})
    assert made == [(str(tmp_path / "tensorboard"), purge), ("loss", 0.5, 12), "flushed"]


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
