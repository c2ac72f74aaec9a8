"""Opening a run: which checkpoint, and which of its weights."""

import dataclasses
from pathlib import Path

import pytest
import torch

from eclip.config import OptimConfig
from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.objectives.settings import ObjectiveConfig
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.training.checkpoint import load_run, save_checkpoint
from eclip.training.checkpoint.files import list_checkpoints
from eclip.training.momentum import make_momentum
from eclip.training.optim import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def _open_folder(run_dir: Path, objective: ObjectiveConfig) -> Path:
    config = dataclasses.replace(PRESETS["debug"], run_dir=run_dir, objective=objective)
    run_dir.mkdir()
    (run_dir / "config.json").write_text(config.to_json())
    Tokenizer.train(["red sofa", "blue lamp"], 64).save(run_dir / "tokenizer")
    return run_dir


@torch.no_grad()
def _shifted(model: ECLIP, by: float) -> ECLIP:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(by)
    return model


def test_the_moving_average_with_the_locked_parts_of_the_model(tmp_path: Path) -> None:
    model = ECLIP(PRESETS["debug"].model)
    model.text_encoder.requires_grad_(False)
    momentum = make_momentum(model)
    average = {name: value.clone() for name, value in momentum.state_dict().items()}
    _shifted(model, 0.1)
    run_dir = _open_folder(tmp_path / "run", ObjectiveConfig())
    save_checkpoint(run_dir, 1, model, momentum, build_optimizer(model, OptimConfig()), {}, ALONE)
    found = load_run(run_dir, weights="momentum")[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in average.items())
    trained = load_run(run_dir)[0].state_dict()
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(found["image_projection.weight"], trained["image_projection.weight"])


def test_a_run_without_a_momentum_model_says_so(tmp_path: Path) -> None:
    model = ECLIP(PRESETS["debug"].model)
    run_dir = _open_folder(tmp_path / "run", ObjectiveConfig(objective="clip"))
    save_checkpoint(run_dir, 1, model, None, build_optimizer(model, OptimConfig()), {}, ALONE)
    with pytest.raises(ValueError, match="no momentum weights, --objective clip trains without.*--weights model"):
        load_run(run_dir, weights="momentum")


def test_the_best_stays_and_is_found(tmp_path: Path) -> None:
    """The earlier one of two that are as good."""
    model = ECLIP(PRESETS["debug"].model)
    optimizer = build_optimizer(model, OptimConfig())
    run_dir = _open_folder(tmp_path / "run", ObjectiveConfig(objective="clip"))
    best: dict[str, torch.Tensor] = {}
    for step, loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.0), (5, 2.5)):
        _shifted(model, 0.1)
        if step == 2:
            best = {name: value.clone() for name, value in model.state_dict().items()}
        state = {} if loss is None else {"val_loss": loss}
        save_checkpoint(run_dir, step, model, None, optimizer, state, ALONE, keep=1)
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000002", "step_00000005"]
    found = load_run(run_dir, which="best")[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in best.items())
