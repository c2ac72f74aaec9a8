"""What a run is made of: locks and cached features do what they say, loaders stall before ranks give up."""

import dataclasses
from pathlib import Path

import pytest
import torch

from eclip.train import train
from eclip.training.build import build_model, stall_limit
from eclip.training.checkpoint import load_run
from tests.training.run_folders import ALONE, make_config, metrics_lines

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_locked_towers_stay_and_clip_leaves_the_decoder(twelve_products: Path, tmp_path: Path) -> None:
    config = make_config(twelve_products, tmp_path, lock_image=True, objective="clip")
    assert train(config, ALONE)
    trained, saved, tokenizer = load_run(tmp_path)
    assert saved.model.vocab_size == tokenizer.vocab_size
    start = build_model(saved)
    changed = {n.split(".")[0] for n, p in trained.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed == {"text_encoder", "image_projection", "text_projection", "logit_scale"}


def test_cached_features(twelve_products: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "run", tmp_path / "again"]
    for run_dir in runs:
        config = make_config(twelve_products, run_dir, lock_image=True, lock_text=True, cache_features=True)
        assert train(config, ALONE)
        assert len(list((twelve_products / "features").glob("*.npy"))) == 2
    first, again = ([line["loss"] for line in metrics_lines(run_dir)] for run_dir in runs)
    assert first == again


def test_a_loader_stalls_before_the_other_ranks_give_up(twelve_products: Path, tmp_path: Path) -> None:
    config = make_config(twelve_products, tmp_path, rank_timeout_seconds=20)
    assert stall_limit(config, world_size=1) == config.data.stall_seconds
    assert stall_limit(config, world_size=2) == 10
    patient = dataclasses.replace(config, data=dataclasses.replace(config.data, stall_seconds=0))
    assert stall_limit(patient, world_size=2) == 0
