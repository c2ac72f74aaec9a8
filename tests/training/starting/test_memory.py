"""The formulas of memory against what autograd saves and what processes take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.training.starting.memory import cache_bytes, loader_bytes, parameters, state_bytes, step_bytes
from tests.helpers import ROOT
from tests.training.run_folders import make_config

# A run of two steps; prints its peak above what the process had before, and the estimate.
_RUN = """
import dataclasses, json, sys, torch
from pathlib import Path
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.train import train
from eclip.training.checkpoint import load_run
from eclip.training.starting.memory import step_bytes

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))

preset, batch, micro, data_dir, run_dir = sys.argv[1:]
base = PRESETS[preset]
config = dataclasses.replace(
    base, run_dir=Path(run_dir), steps=2, global_batch_size=int(batch), micro_batch=int(micro) or None, evaluate=False,
    lock_image=False, lock_text=False, cache_features=False, image_weights=None, text_weights=None, vocab_file=None,
    data=dataclasses.replace(base.data, data_dir=Path(data_dir), num_workers=0))
before = status("VmRSS")
train(config, Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None))
peak = status("VmHWM") - before
config = dataclasses.replace(config, model=load_run(Path(run_dir))[1].model)
print(json.dumps([peak, step_bytes(config, 6, world_size=1, shards=1, bf16=False, cuda=False)]))
"""


@pytest.mark.parametrize(("preset", "batch", "micro"), [("demo", 64, 0), ("demo", 64, 16), ("demo_towers", 8, 0)])
def test_a_run_takes_what_is_estimated(preset: str, batch: int, micro: int, data_dir: Path, tmp_path: Path) -> None:
    arguments = [preset, str(batch), str(micro), str(data_dir), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert child.returncode == 0, child.stderr
    measured, estimated = json.loads(child.stdout.splitlines()[-1])
    assert 0.7 * measured < estimated < 1.3 * measured


def test_parameters_are_those_of_the_model() -> None:
    for name in ("debug", "demo"):
        count = sum(p.numel() for p in ECLIP(PRESETS[name].model).parameters())
        assert parameters(PRESETS[name]) == (count, count)
    every, trained = parameters(PRESETS["demo_towers"])
    assert trained < 0.15 * every
    assert state_bytes(PRESETS["demo_towers"], 1) == 4 * (every + 4 * trained)
    assert state_bytes(PRESETS["demo"], 4) == state_bytes(PRESETS["demo"], 1) / 4


def test_memory_is_the_micro_batchs() -> None:
    large, small = (
        step_bytes(make_config(Path("d"), Path("r"), global_batch_size=4096, micro_batch=m), 9,
                   world_size=1, shards=1, bf16=False, cuda=False)
        for m in (None, 8)
    )  # fmt: skip
    assert small < large / 4


def test_the_papers_model_at_4096_on_eight_gpus() -> None:
    """47 to 52 GiB a GPU were added up by hand from measured parts; the formula may miss a fifth, and does below."""
    needed = step_bytes(PRESETS["vit_b16"], 20, world_size=8, shards=8, bf16=True, cuda=True)
    assert 0.8 * 47 < needed / 2**30 < 1.2 * 52


def test_workers_and_cache() -> None:
    # Eight workers, two parts each, 154 MB a part of 512 products, and two with the trainer.
    assert loader_bytes(PRESETS["vit_b16"], 8) == pytest.approx(18 * 154.1e6, rel=0.15)
    assert loader_bytes(PRESETS["shop"], 1) == 0
    assert cache_bytes(PRESETS["shop"], 1) == 2 * 145 * 384 * 2  # 109 KiB a view
