"""What the tests of starts and resumes share: a small run, and a refusal that must change nothing."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eclip.config import RunConfig
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.train import CannotStart, train
from tests.dataloading.fixtures import make_split

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def make_data(folder: Path) -> Path:
    """Three equal splits of nine products."""
    for split in ("train", "val", "test"):
        make_split(folder, split, products=9, images=4, tars=1)
    return folder


def make_config(data_dir: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """The debug preset; changes may name any setting, whichever part it is in."""
    base = PRESETS["debug"]
    wanted = {"data_dir": data_dir, "run_dir": run_dir, "steps": 2, "evaluate": False, **changes}
    parts = {}
    for part in ("model", "data", "objective", "optim", "compute"):
        own = {f.name for f in dataclasses.fields(getattr(base, part))} & set(wanted)
        parts[part] = dataclasses.replace(getattr(base, part), **{name: wanted.pop(name) for name in own})
    return dataclasses.replace(base, **parts, **wanted)


def make_run(data_dir: Path, run_dir: Path, **changes: Any) -> Path:
    """A run of 2 steps with checkpoints of both; changes as in `make_config`."""
    assert train(make_config(data_dir, run_dir, checkpoint_every=1, **changes), ALONE)
    return run_dir


def metrics_lines(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def copy_run(finished: Path, run_dir: Path) -> Path:
    """A copy of a run, with files of a user beside and below its own."""
    shutil.copytree(finished, run_dir)
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "checkpoints" / "best").mkdir()
    (run_dir / "checkpoints" / "best" / "weights.bin").write_bytes(b"mine")
    return run_dir


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def assert_refused(config: RunConfig, words: str) -> None:
    """A start is refused in one line and leaves the run folder as it was."""
    before = contents(config.run_dir) if config.run_dir.is_dir() else None
    with pytest.raises(CannotStart, match=words) as error:
        train(config, ALONE)
    assert "\n" not in str(error.value)
    assert (contents(config.run_dir) if config.run_dir.is_dir() else None) == before
