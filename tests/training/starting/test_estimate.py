"""What surely does not fit is refused in seconds with a way out, what is close is told, the rest is let go on."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from eclip.config import RunConfig
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.system.memory import available_memory
from eclip.dataloading.text import Tokenizer
from eclip.presets import PRESETS
from eclip.training.starting import estimate
from eclip.training.starting.estimate import TooLarge, check_resources
from eclip.training.starting.memory import cache_bytes, loader_bytes, step_bytes
from tests.helpers import ROOT
from tests.training.run_folders import ALONE, make_config

_GIB = 2**30


class Disk(NamedTuple):
    total: float
    used: float
    free: float


def check(config: RunConfig, data_dir: Path, monkeypatch: pytest.MonkeyPatch, **room: float) -> tuple[str, ...]:
    if "memory" in room:
        monkeypatch.setattr(estimate, "available_memory", lambda: room["memory"])
    if "disk" in room:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, room["disk"]))
    index = ShardIndex.open(data_dir, "train")
    return check_resources(config, index, Tokenizer.train(index.texts(), 500), ALONE)


def test_memory_is_judged_against_what_is_there(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(PRESETS["demo"], global_batch_size=512)
    needed = step_bytes(config, 9, world_size=1, shards=1, bf16=False, cuda=False) + loader_bytes(config, 1)
    assert check(config, data_dir, monkeypatch, memory=2 * needed) == ()
    (close,) = check(config, data_dir, monkeypatch, memory=needed)
    assert "close; --micro-batch 256 fits" in close
    with pytest.raises(TooLarge, match=r"about [\d.]+ GiB of memory are needed, [\d.]+ are free") as error:
        check(config, data_dir, monkeypatch, memory=needed / 3)
    assert "\n" not in str(error.value)
    found = re.search(r"--micro-batch (\d+) fits", str(error.value))
    assert found is not None
    smaller = dataclasses.replace(config, micro_batch=int(found[1]))
    assert check(smaller, data_dir, monkeypatch, memory=needed / 3) == ()


def test_fewer_workers_are_the_mildest_way_out(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"global_batch_size": 8, "image_size": 512, "num_workers": 500, "decoder": "torch"}
    with pytest.raises(TooLarge, match=r"500 data workers \d+.*; --num-workers 1 fits"):
        check(make_config(data_dir, data_dir, **changes), data_dir, monkeypatch, memory=8 * _GIB)


def test_where_nothing_fits_that_is_said(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TooLarge, match="no --micro-batch fits: a smaller --global-batch-size or model, --lock-image"):
        check(PRESETS["vit_l16"], data_dir, monkeypatch, memory=2 * _GIB)


def test_a_cache_without_room_is_refused_before_it_is_computed(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = PRESETS["demo_towers"]
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, data_dir=data_dir))
    needed = cache_bytes(config, ShardIndex.open(data_dir, "train").num_images)
    assert check(config, data_dir, monkeypatch, disk=2 * needed) == ()
    assert "close" in check(config, data_dir, monkeypatch, disk=needed)[0]
    with pytest.raises(TooLarge, match=r"features of 36 images in 2 views take .*free some, use fewer --cached-views"):
        check(config, data_dir, monkeypatch, disk=needed / 2)
    (data_dir / "features").mkdir()
    with (data_dir / "features" / "images-0.npy").open("wb") as file:
        file.truncate(needed + 128)
    assert check(config, data_dir, monkeypatch, disk=0) == ()
    shutil.rmtree(data_dir / "features")


def test_the_papers_model_on_a_small_machine_as_a_user_meets_it(data_dir: Path, tmp_path: Path) -> None:
    if (available_memory() or 0) > 400 * _GIB:
        pytest.skip("this machine has room for it")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "eclip.train", "--preset", "vit_b16", "--data-dir", str(data_dir)]
    command += ["--run-dir", str(tmp_path / "run")]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 1
    assert re.search(r"about 5\d\d\.\d GiB of memory are needed, [\d.]+ are free \(model and optimizer", child.stderr)
    assert len(child.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
