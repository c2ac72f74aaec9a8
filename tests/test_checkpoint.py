"""Saving and loading: everything comes back, nothing half-written is taken, misfits are named."""

import dataclasses
from pathlib import Path

import pytest
import torch

from eclip.checkpoint import list_checkpoints, load_checkpoint, load_run, newest_checkpoint, save_checkpoint
from eclip.config import OptimConfig
from eclip.dataloading.text import WordPiece
from eclip.model.eclip import ECLIP
from eclip.momentum import make_momentum, update_momentum
from eclip.optim import build_optimizer
from eclip.parallel import Ranks
from eclip.presets import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
CONFIG = PRESETS["debug"].model
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
Run = tuple[ECLIP, ECLIP, torch.optim.AdamW]


def _new(seed: int) -> Run:
    torch.manual_seed(seed)
    model = ECLIP(CONFIG)
    model.text_encoder.requires_grad_(False)
    return model, make_momentum(model), build_optimizer(model, OptimConfig())


def _train(run: Run, steps: int) -> None:
    """Some gradients; the matching head never gets one, as in a run without L_itm."""
    model, momentum, optimizer = run
    for _ in range(steps):
        features = model.encode_image(torch.randn(2, 3, 32, 32))
        (features.cls.square().mean() * model.scale()).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_momentum(model, momentum, 0.9)


@pytest.fixture(scope="module")
def trained() -> Run:
    run = _new(0)
    _train(run, 2)
    return run


def test_everything_comes_back(trained: Run, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 2, *trained, {"loader": {"step": 2}}, ALONE)
    assert path == newest_checkpoint(tmp_path)
    other = _new(1)
    assert load_checkpoint(path, *other, ALONE) == {"step": 2, "world_size": 1, "loader": {"step": 2}}
    for one, two in zip(trained[:2], other[:2], strict=True):
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    # The next step is the same to the bit: moments and step counters are there, and only where they were.
    assert len(other[2].state) == len(trained[2].state)
    torch.manual_seed(5)
    _train(other, 1)
    again = _new(1)
    load_checkpoint(path, *again, ALONE)
    torch.manual_seed(5)
    _train(again, 1)
    assert all(torch.equal(a, b) for a, b in zip(other[0].parameters(), again[0].parameters(), strict=True))


def test_shared_towers_are_stored_once(trained: Run, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    path = save_checkpoint(tmp_path, 1, *trained, {}, ALONE)
    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    assert any(key.startswith("model.text_encoder.") for key in keys)
    assert any(key.startswith("momentum.image_encoder.") for key in keys)
    assert not any(key.startswith("momentum.text_encoder.") for key in keys)
    assert not any(key.startswith("optimizer.text_encoder.") for key in keys)


def test_only_complete_checkpoints_count_and_old_ones_go(trained: Run, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 10, 100):
        save_checkpoint(tmp_path, step, *trained, {}, ALONE, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000100"]
    for name in ("step_00000200.partial", "step_00000300", "step_tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000100"
    # The same step again replaces the old one.
    save_checkpoint(tmp_path, 100, *trained, {"again": True}, ALONE)
    assert load_checkpoint(tmp_path / "checkpoints" / "step_00000100", *_new(1), ALONE)["again"]


def test_misfit_is_named(trained: Run, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {}, ALONE)
    wider = ECLIP(dataclasses.replace(CONFIG, embed_dim=48))
    with pytest.raises(ValueError, match=r"image_projection.weight of shape \(48, 32\) has shape \(32, 32\) there"):
        load_checkpoint(path, wider, None, build_optimizer(wider, OptimConfig()), ALONE)
    deeper = ECLIP(dataclasses.replace(CONFIG, decoder_depth=2))
    with pytest.raises(ValueError, match=r"instance_decoder.blocks.1.* is not in it"):
        load_checkpoint(path, deeper, None, build_optimizer(deeper, OptimConfig()), ALONE)


def test_load_run(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_run(tmp_path)
    # Opening a run must not need the files it was started from.
    config = dataclasses.replace(PRESETS["debug"], run_dir=tmp_path, image_weights=Path("gone.safetensors"))
    (tmp_path / "config.json").write_text(config.to_json())
    WordPiece.train(["red sofa", "blue lamp"], 64).save(tmp_path / "tokenizer")
    save_checkpoint(tmp_path, 1, *trained, {}, ALONE)
    model, loaded, tokenizer = load_run(tmp_path)
    assert loaded == config
    assert not model.training
    assert tokenizer.encode(["red sofa"])[0].numel() >= 4
    for (name, a), b in zip(trained[0].state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
