"""Reading a checkpoint: into a run that goes on, on any number of ranks, or as a model to use."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from eclip.config import RunConfig
from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.training.checkpoint.files import Which, find_checkpoint, list_checkpoints, read_state
from eclip.training.checkpoint.run_folder import read_config, read_tokenizer
from eclip.training.checkpoint.tensors import (
    cause,
    empty_optimizer_state,
    model_tensors,
    require_fit,
    stored_shapes,
    unreadable,
)
from eclip.training.momentum import is_locked
from eclip.weights.exported import is_exported

Weights = Literal["model", "momentum"]
"""The trained weights, or their moving average (EMA), which an objective with a momentum model keeps."""
_TOWERS = ("image_encoder", "text_encoder")


def load_checkpoint(
    path: Path, model: nn.Module, momentum: nn.Module | None, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Fill model, momentum model and optimizer in place; returns state.json ("step", "world_size", what was passed).

    The checkpoint may come from another number of ranks. Raises ValueError when it does not fit the model or cannot be
    read.
    """
    stored = stored_shapes(path)
    tensors = model_tensors(model, momentum)
    require_fit(path, tensors, stored, ("model.", "momentum.") if momentum is not None else ("model.",))
    # An optimizer makes its state at a parameter's first gradient: there is state for those that the checkpoint knows.
    fresh = empty_optimizer_state(model, optimizer, stored)
    tensors |= {f"optimizer.{name}.{key}": t for name, entry in fresh.items() for key, t in entry.items()}
    _read(tensors, path, ranks)
    parameters = dict(model.named_parameters())
    for name, entry in fresh.items():
        optimizer.state[parameters[name]] = entry
    for part in (model, momentum):
        if isinstance(part, ECLIP):  # written when the clamp stood in the forward pass
            part.clamp_logit_scale()
    return read_state(path)


def load_locked_towers(path: Path, model: ECLIP) -> None:
    """Give the locked towers of `model` (not sharded) the weights of a checkpoint, before their outputs are cached."""
    locked = [name for name in _TOWERS if is_locked(model.get_submodule(name))]
    tensors = model_tensors(model, None)
    tensors = {key: value for key, value in tensors.items() if key.split(".")[1] in locked}
    require_fit(path, tensors, stored_shapes(path), [f"model.{name}." for name in locked])
    _read(tensors, path, None)


def load_run(
    run_dir: Path, device: torch.device | str = "cpu", *, which: Which = "newest", weights: Weights = "model"
) -> tuple[ECLIP, RunConfig, Tokenizer]:
    """A whole checkpoint of a run: the model in eval mode on `device`, its configuration, its tokenizer.

    which: the newest, or the best, which has the lowest loss of the val split (--validate-every). weights: the trained
    ones, or their moving average. One process suffices, whatever number of ranks wrote it. Raises ValueError, in one
    line, when no checkpoint is whole or none has what is asked for, when config.json cannot be read, when the tokenizer
    is not the one that the weights were trained with.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir) if list_checkpoints(run_dir) else None
    found = find_checkpoint(run_dir, which=which)
    if config is None and is_exported(run_dir):
        raise ValueError(
            f"{run_dir}: an exported model, not a run; eclip.load and --start-from open it, what needs settings or "
            f"catalogue of a run takes the one that it is from"
        )
    if config is None or found is None:
        raise ValueError(f"{run_dir}: no complete checkpoint; train first (python -m eclip.train --run-dir {run_dir})")
    tokenizer = read_tokenizer(run_dir, found.state.get("tokenizer"))
    model = ECLIP(config.model)
    tensors = model_tensors(model, None)
    stored = stored_shapes(found.path)
    require_fit(found.path, tensors, stored, ("model.",))
    if weights == "momentum":
        tensors = _averaged(tensors, stored, found.path, config)
    _read(tensors, found.path, None)
    model.clamp_logit_scale()
    return model.to(device).eval(), config, tokenizer


def _averaged(
    tensors: dict[str, Tensor], stored: dict[str, tuple[int, ...]], path: Path, config: RunConfig
) -> dict[str, Tensor]:
    """`tensors` under the names of the momentum model; what is locked is stored once, as the model's."""
    if not any(key.startswith("momentum.") for key in stored):
        raise ValueError(
            f"{path}: holds no momentum weights, --objective {config.objective.objective} trains without a momentum "
            f"model; use --weights model"
        )
    names = {key: f"momentum.{key.removeprefix('model.')}" for key in tensors}
    return {names[key] if names[key] in stored else key: value for key, value in tensors.items()}


def _read(tensors: dict[str, Tensor], path: Path, ranks: Ranks | None) -> None:
    """Fill `tensors` from a checkpoint, on all ranks together or (None) on this one alone."""
    group = None if ranks is None else ranks.host_group
    try:
        dcp.load(tensors, checkpoint_id=path, process_group=group, no_dist=ranks is None or ranks.mesh is None)
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(unreadable(path, cause(error))) from error
