"""The loss of the val split while training: what it is, that it changes nothing, and that the best checkpoint stays."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.shards import ShardIndex
from eclip.train import train
from eclip.training import validation
from eclip.training.checkpoint import load_run
from eclip.training.checkpoint.files import find_checkpoint, list_checkpoints, read_state
from tests.helpers import ROOT, rank_environment, run_torchrun
from tests.training.run_folders import ALONE, assert_refused, make_config, metrics_lines


def _val_losses(run_dir: Path) -> dict[int, float]:
    return {int(line["step"]): line["val_loss"] for line in metrics_lines(run_dir) if "val_loss" in line}


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_run(run_dir)[0].state_dict()


def test_it_is_the_contrastive_loss_of_the_split_and_changes_nothing(data_dir: Path, tmp_path: Path) -> None:
    """Against a loss written plainly in float64, on one batch of all nine products."""
    flags = {"steps": 5, "log_every": 5, "soft_labels": "none", "token_keep": 0.5}
    assert train(make_config(data_dir, tmp_path / "with", validate_every=2, **flags), ALONE)
    assert train(make_config(data_dir, tmp_path / "without", **flags), ALONE)
    losses = _val_losses(tmp_path / "with")
    assert list(losses) == [2, 4, 5]  # and after the last step
    one, two = _weights(tmp_path / "with"), _weights(tmp_path / "without")
    assert all(torch.equal(one[name], two[name]) for name in one)
    last = [metrics_lines(tmp_path / name)[-1]["loss"] for name in ("with", "without")]
    assert last[0] == last[1]

    model, config, tokenizer = load_run(tmp_path / "with")
    index = ShardIndex.open(data_dir, "val")
    loader = ProductLoader(
        index, tokenizer, global_batch_size=index.num_products, image_size=config.model.image_size, num_workers=0,
        decoder="torch", crop_scale=config.data.crop_scale, flip=config.data.flip, max_tokens=config.data.max_tokens,
    )  # fmt: skip
    batch = next(iter(loader))
    assert batch.images is not None
    with torch.no_grad():
        tokens, bounds, longest = batch.titles(0)
        images = F.normalize(model.encode_image(batch.images[:, 0]).cls.double(), dim=-1)
        texts = F.normalize(model.encode_text(tokens, bounds, longest=longest).double(), dim=-1)
        logits = images @ texts.T * model.scale().double()
    rows = torch.arange(len(logits))
    exact = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    assert losses[5] == pytest.approx(exact.item(), abs=1e-5)


def test_the_best_checkpoint_stays(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 2 are the lowest so far and are saved for that; the newest ones come at their time."""
    told = iter([3.0, 2.0, 2.5, math.nan, 2.0, 2.4])
    monkeypatch.setattr(validation.Validation, "__call__", lambda self, call: next(told))
    run_dir = tmp_path / "run"
    config = make_config(data_dir, run_dir, steps=6, validate_every=1, checkpoint_every=3, keep_checkpoints=1)
    assert train(config, ALONE)
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000002", "step_00000006"]
    states = [read_state(path) for path in list_checkpoints(run_dir)]
    assert [state["val_loss"] for state in states] == [2.0, 2.4]
    assert list(_val_losses(run_dir)) == [1, 2, 3, 5, 6]  # a number that is none is not written
    newest, best = _weights(run_dir), load_run(run_dir, which="best")[0].state_dict()
    assert not torch.equal(newest["image_projection.weight"], best["image_projection.weight"])
    # A resumed run knows what there is to beat.
    told = iter([2.1, 1.9, 2.2])
    assert train(dataclasses.replace(config, steps=9, resume=True), ALONE)
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000008", "step_00000009"]
    # A damaged one is not the best.
    (run_dir / "checkpoints" / "step_00000008" / ".metadata").unlink()
    found = find_checkpoint(run_dir, which="best")
    assert found is not None and found.path.name == "step_00000009"


def test_without_losses_there_is_no_best(finished: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint has a loss of the val split.*--validate-every"):
        load_run(finished, which="best")


def test_a_split_that_is_not_there_is_refused(twelve_products: Path, tmp_path: Path) -> None:
    words = r"--validate-every 2: .*val.*; leave it out \(0\)"
    assert_refused(make_config(twelve_products, tmp_path / "run", validate_every=2), words)


def test_cached_features_do_not_matter(data_dir: Path, tmp_path: Path) -> None:
    """The cache holds the train split alone; val goes through the locked towers."""
    flags = {"lock_image": True, "lock_text": True, "validate_every": 1, "steps": 1}
    assert train(make_config(data_dir, tmp_path / "plain", **flags), ALONE)
    assert train(make_config(data_dir, tmp_path / "cached", cache_features=True, **flags), ALONE)
    # One step from other crops; without it they would be equal to the bit.
    assert _val_losses(tmp_path / "cached")[1] == pytest.approx(_val_losses(tmp_path / "plain")[1], abs=0.05)


RANKS = """
import sys
from eclip.train import main, leave
from eclip.training import validation
validation._BATCH = 3  # three batches of the nine products: the second rank has none in the last round
leave(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("shard", ["full", "none"])
def test_two_ranks_give_the_loss_of_one(
    data_dir: Path, tmp_path: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--preset", "debug", "--data-dir", str(data_dir), "--steps", "3", "--validate-every", "1"]
    flags += ["--no-evaluate", "--global-batch-size", "8"]
    run_torchrun(RANKS, *flags, "--run-dir", str(tmp_path / "two"), "--shard", shard)
    monkeypatch.setattr(validation, "_BATCH", 3)
    alone = make_config(data_dir, tmp_path / "one", steps=3, validate_every=1, global_batch_size=8)
    assert train(alone, ALONE)
    one, two = _val_losses(tmp_path / "one"), _val_losses(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3]
    assert list(two.values()) == pytest.approx(list(one.values()), abs=2e-4)
    losses = [[line["loss"] for line in metrics_lines(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_evaluation_of_the_best_and_of_the_average(data_dir: Path, tmp_path: Path) -> None:
    """As a user calls it; each has files of its own."""
    run_dir = tmp_path / "run"
    assert train(make_config(data_dir, run_dir, steps=2, validate_every=1), ALONE)
    command = [sys.executable, "-m", "eclip.evaluate", "--checkpoint", str(run_dir), "--quiet"]
    done = subprocess.run(
        [*command, "--best", "--weights", "momentum"], cwd=ROOT, env=rank_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "best checkpoint, momentum weights, test split" in done.stdout
    result = json.loads((run_dir / "evaluation-best-momentum.json").read_text())
    assert (result["checkpoint"], result["weights"]) == ("best", "momentum")
    assert not (run_dir / "evaluation.json").exists()
