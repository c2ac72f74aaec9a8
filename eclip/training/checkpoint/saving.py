"""Checkpoints: written by all ranks with torch.distributed.checkpoint, readable by any number of ranks.

    run_dir/config.json, data.json        the resolved configuration; the data's fingerprints (run_folder.py)
    run_dir/tokenizer/                    the vocabulary
    run_dir/checkpoints/step_00000200/    tensors of the model, the momentum model and the optimizer, and state.json

A checkpoint is written under another name and renamed when it is whole and on the disk, so that a killed run leaves no
half one; files.py says what whole means. Tensors are keyed `model.NAME`, `momentum.NAME` (parts shared with
the model left out) and `optimizer.NAME.KEY`.
"""

import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from eclip.config import RunConfig
from eclip.dataloading.text import WordPiece
from eclip.files import PARTIAL, CannotWrite, cannot_write, sha256, writing
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.training.checkpoint.files import (
    delete,
    file_facts,
    find_checkpoint,
    keep_newest,
    list_checkpoints,
    own_files,
    put_in_place,
    read_state,
    step_folder,
)
from eclip.training.checkpoint.run_folder import TOKENIZER, read_config, read_tokenizer
from eclip.training.momentum import is_locked
from eclip.training.optim import fresh_state

# A single rank asks for no process group; no need to be told at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

_TOWERS = ("image_encoder", "text_encoder")


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: nn.Module,
    momentum: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    ranks: Ranks,
    *,
    keep: int = 2,
) -> Path:
    """Write the state after `step` steps; every rank must call it. `state` is rank 0's JSON-able rest (the loader's).

    Returns the checkpoint's folder. Afterwards only the `keep` newest stay. Raises CannotWrite on every rank when one
    could not write its part; the earlier checkpoints are then untouched and nothing is left of this one.
    """
    partial = step_folder(run_dir, step).with_suffix(PARTIAL)
    ranks.from_main(lambda: _make_empty(partial))
    tensors = _model_tensors(model, momentum) | _optimizer_tensors(model, optimizer)
    problem, facts = None, {}
    try:
        dcp.save(tensors, checkpoint_id=partial, process_group=ranks.host_group, no_dist=ranks.mesh is None)
        facts = file_facts(own_files(partial, ranks))
    except (OSError, RuntimeError, dcp.CheckpointException) as error:  # the last one is no Exception
        problem = cannot_write(partial, _cause(error))
    parts = ranks.gather((problem, facts))
    problem = next((p for p, _ in parts if p is not None), None)
    if problem is not None:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CannotWrite(problem)
    everything = {
        "step": step,
        "world_size": ranks.world_size,
        **state,
        "tokenizer": _tokenizer_digest(run_dir),
        "files": {name: facts for _, part in parts for name, facts in part.items()},
    }
    return ranks.from_main(lambda: _finish(partial, everything, run_dir, step, keep))


def _make_empty(partial: Path) -> None:
    with writing(partial):
        delete(partial)
        partial.mkdir(parents=True)


def _finish(partial: Path, state: Mapping[str, Any], run_dir: Path, step: int, keep: int) -> Path:
    try:
        with writing(partial):
            final = put_in_place(partial, state)
    except CannotWrite:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    keep_newest(run_dir, step, keep)
    return final


def _cause(error: BaseException) -> BaseException:
    """The first rank's own error in what torch.distributed.checkpoint raises on all."""
    if isinstance(error, dcp.CheckpointException):
        return next((_cause(failure[0]) for _, failure in sorted(error.failures.items())), error)
    return error


def load_checkpoint(
    path: Path, model: nn.Module, momentum: nn.Module | None, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Fill model, momentum model and optimizer in place; returns state.json ("step", "world_size", what was passed).

    The checkpoint may come from another number of ranks. Raises ValueError when it does not fit the model or cannot be
    read.
    """
    stored = _stored_shapes(path)
    tensors = _model_tensors(model, momentum)
    _require_fit(path, tensors, stored, ("model.", "momentum.") if momentum is not None else ("model.",))
    # An optimizer makes its state at a parameter's first gradient: there is state for those that the checkpoint knows.
    fresh = _empty_optimizer_state(model, optimizer, stored)
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
    tensors = _model_tensors(model, None)
    tensors = {key: value for key, value in tensors.items() if key.split(".")[1] in locked}
    _require_fit(path, tensors, _stored_shapes(path), [f"model.{name}." for name in locked])
    _read(tensors, path, None)


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> tuple[ECLIP, RunConfig, WordPiece]:
    """The newest whole checkpoint of a run: the model in eval mode on `device`, its configuration, its tokenizer.

    One process suffices, whatever number of ranks wrote it. Raises ValueError, in one line, when no checkpoint is
    whole, when config.json cannot be read, when the tokenizer is not the one that the weights were trained with.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir) if list_checkpoints(run_dir) else None
    found = find_checkpoint(run_dir)
    if config is None or found is None:
        raise ValueError(f"{run_dir}: no complete checkpoint; train first (python -m eclip.train --run-dir {run_dir})")
    tokenizer = read_tokenizer(run_dir, found.state.get("tokenizer"))
    model = ECLIP(config.model)
    tensors = _model_tensors(model, None)
    _require_fit(found.path, tensors, _stored_shapes(found.path), ("model.",))
    _read(tensors, found.path, None)
    model.clamp_logit_scale()
    return model.to(device).eval(), config, tokenizer


def _read(tensors: dict[str, Tensor], path: Path, ranks: Ranks | None) -> None:
    """Fill `tensors` from a checkpoint, on all ranks together or (None) on this one alone."""
    group = None if ranks is None else ranks.host_group
    try:
        dcp.load(tensors, checkpoint_id=path, process_group=group, no_dist=ranks is None or ranks.mesh is None)
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(_unreadable(path, _cause(error))) from error


def _unreadable(path: Path, error: BaseException) -> str:
    reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return f"{path}: cannot be read ({reason}); remove the folder to take the checkpoint before"


def _tokenizer_digest(run_dir: Path) -> str | None:
    path = run_dir / TOKENIZER
    return sha256(path) if path.is_file() else None


def _model_tensors(model: nn.Module, momentum: nn.Module | None) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if momentum is not None:
        own = {name for name, p in model.named_parameters()}
        shared = {n for n, p in momentum.named_parameters() if n in own and p is model.get_parameter(n)}
        tensors |= {f"momentum.{n}": v for n, v in momentum.state_dict().items() if n not in shared}
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _empty_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, Tensor]]:
    managed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    fresh = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in managed:
            entry = fresh_state(optimizer, parameter)
            # Not there: it had no gradient yet, or another optimizer kept something else.
            if all(f"optimizer.{name}.{key}" in stored for key in entry):
                fresh[name] = entry
    return fresh


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(_unreadable(path / ".metadata", error)) from error
    return {key: tuple(entry.size) for key, entry in metadata.items() if hasattr(entry, "size")}


def _require_fit(
    path: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]], prefixes: Iterable[str]
) -> None:
    """Raise ValueError unless the checkpoint has each tensor in its shape, and no other one that begins so."""
    advice = "use the configuration that the checkpoint was written with"
    for key, value in tensors.items():
        if stored.get(key) != tuple(value.shape):
            found = "is not in it" if key not in stored else f"has shape {stored[key]} there"
            raise ValueError(f"{path}: {key} of shape {tuple(value.shape)} {found}; {advice}")
    spare = next((key for key in stored if key.startswith(tuple(prefixes)) and key not in tensors), None)
    if spare is not None:
        raise ValueError(f"{path}: holds {spare}, which the model has no place for; {advice}")
