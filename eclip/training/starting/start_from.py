"""--start-from: begin with the weights of a trained ECLIP, on another catalogue or with another objective.

Its model settings, its vocabulary and its weights are taken along: they mean nothing without each other. Optimizer,
step and data order are new, and the momentum model begins as a copy. A run that has begun needs the other no more:
its own folder holds all of it.

What can be started from is a run's folder or an exported model. `open_start` and `load_start` are all that training
knows of their form.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from eclip.config import RunConfig
from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.model.settings import ModelConfig
from eclip.setting_rules import flag
from eclip.training.checkpoint import load_run
from eclip.training.checkpoint.files import find_checkpoint, list_checkpoints
from eclip.training.checkpoint.run_folder import read_config, read_tokenizer
from eclip.weights.exported import is_exported, read_exported

# Of the tokenizer, and of the machine.
_NOT_TAKEN = ("vocab_size", "kernels")
_GIVE = "give the folder of a trained run, or one that eclip export wrote"


@dataclass(frozen=True)
class Start:
    """A trained ECLIP that a run begins with."""

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer


def open_start(config: RunConfig) -> Start:
    """What --start-from names, read and checked to the last byte. Changes nothing.

    Raises ValueError when it is not there, is neither a run nor an exported model, is damaged, is the run's own folder,
    or when its model is not the one that `config` asks for.
    """
    path = config.start_from
    assert path is not None
    if path.resolve() == config.run_dir.resolve():
        raise ValueError(f"--start-from {path}: the run's own folder; continue it with --resume, or give another")
    if not path.is_dir():
        hint = "; `make train` trains the one that this preset begins with" if config.preset == "shop" else ""
        raise ValueError(f"--start-from {path}: no such folder{hint}; {_GIVE}")
    exported = is_exported(path)
    if not exported and not list_checkpoints(path):
        raise ValueError(f"--start-from {path}: no checkpoint there; {_GIVE}")
    try:
        start = _open_exported(path) if exported else _open_run(path)
    except ValueError as error:
        raise ValueError(f"--start-from {path}: {error}") from error
    _require_same_model(path, start.model, config.model)
    return start


def _open_exported(path: Path) -> Start:
    _, facts, tokenizer = read_exported(path)
    return Start(path, facts.model, tokenizer)


def _open_run(path: Path) -> Start:
    saved, found = read_config(path), find_checkpoint(path)
    assert found is not None
    return Start(path, saved.model, read_tokenizer(path, found.state.get("tokenizer")))


def load_start(path: Path, model: ECLIP) -> None:
    """Give `model`, new and on the CPU, the weights of the newest whole checkpoint, or of an exported model. Raises
    ValueError."""
    try:
        started = read_exported(path)[0] if is_exported(path) else load_run(path)[0]
    except ValueError as error:
        raise ValueError(f"--start-from {path}: {error}") from error
    model.load_state_dict(started.state_dict())


def _require_same_model(path: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    """`presets.parse` takes the model's settings from the run: what differs is a flag."""
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _NOT_TAKEN]
    old, new = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    if changed := [name for name in names if old[name] != new[name]]:
        listed = ", ".join(f"another {name} (it has {old[name]}, the flags give {new[name]})" for name in changed)
        raise ValueError(f"--start-from {path} with {listed}; leave {' and '.join(map(flag, changed))} out")
