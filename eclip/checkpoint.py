"""Checkpoints: written by all ranks with torch.distributed.checkpoint, readable by any number of ranks.

    run_dir/config.json                   the resolved configuration
    run_dir/tokenizer/                    the vocabulary
    run_dir/checkpoints/step_00000200/    tensors of the model, the momentum model and AdamW, and state.json

A checkpoint is written under another name and renamed when it is whole, so that a killed run leaves no half one.
Tensors are keyed `model.NAME`, `momentum.NAME` (parts shared with the model left out) and `optimizer.NAME.KEY`.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from .config import RunConfig
from .dataloading.text import WordPiece
from .model.eclip import ECLIP
from .parallel import Ranks

# A single rank asks for no process group; no need to be told at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

_STEP = re.compile(r"step_(\d{8})")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if _STEP.fullmatch(p.name)]
    return sorted(p for p in found if (p / "state.json").is_file() and (p / ".metadata").is_file())


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(list_checkpoints(run_dir)), None)


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

    Returns the checkpoint's folder. Afterwards only the `keep` newest stay.
    """
    final = run_dir / "checkpoints" / f"step_{step:08d}"
    partial = final.with_suffix(".partial")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    tensors = _model_tensors(model, momentum) | _optimizer_tensors(model, optimizer)
    dcp.save(tensors, checkpoint_id=partial, no_dist=ranks.mesh is None)
    ranks.barrier()
    if ranks.is_main:
        (partial / "state.json").write_text(json.dumps({"step": step, "world_size": ranks.world_size, **state}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def load_checkpoint(
    path: Path, model: nn.Module, momentum: nn.Module | None, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Fill model, momentum model and optimizer in place; returns state.json ("step", "world_size", what was passed).

    The checkpoint may come from another number of ranks. Raises ValueError when it does not fit the model.
    """
    stored = _stored_shapes(path)
    tensors = _model_tensors(model, momentum)
    _require_fit(path, tensors, stored)
    # AdamW makes its state at a parameter's first gradient: there is state for those that the checkpoint knows.
    fresh = _empty_optimizer_state(model, optimizer, stored)
    tensors |= {f"optimizer.{name}.{key}": t for name, entry in fresh.items() for key, t in entry.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=ranks.mesh is None)
    parameters = dict(model.named_parameters())
    for name, entry in fresh.items():
        optimizer.state[parameters[name]] = entry
    return json.loads((path / "state.json").read_text())


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> tuple[ECLIP, RunConfig, WordPiece]:
    """The newest checkpoint of a run: the model in eval mode on `device`, its configuration and its tokenizer.

    One process suffices, whatever number of ranks wrote it. Raises ValueError when there is no checkpoint.
    """
    run_dir = Path(run_dir)
    path = newest_checkpoint(run_dir)
    if path is None or not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir}: no complete checkpoint; train first (python -m eclip.train --run-dir {run_dir})")
    config = read_config(run_dir)
    model = ECLIP(config.model)
    tensors = _model_tensors(model, None)
    _require_fit(path, tensors, _stored_shapes(path))
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return model.to(device).eval(), config, WordPiece.load(run_dir / "tokenizer")


def read_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run."""
    return RunConfig.from_json((run_dir / "config.json").read_text())


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
    managed = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    fresh = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in managed and f"optimizer.{name}.step" in stored:
            counter = parameter.device if managed[id(parameter)]["fused"] else torch.device("cpu")
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            fresh[name] = {"step": torch.zeros((), device=counter), **moments}
    return fresh


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in metadata.items() if hasattr(entry, "size")}


def _require_fit(path: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]]) -> None:
    for key, value in tensors.items():
        if stored.get(key) != tuple(value.shape):
            found = "is not in it" if key not in stored else f"has shape {stored[key]} there"
            raise ValueError(
                f"{path}: {key} of shape {tuple(value.shape)} {found}; "
                f"resume with the configuration that the checkpoint was written with"
            )
