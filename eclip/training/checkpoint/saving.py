"""Writing a checkpoint: by all ranks, with torch.distributed.checkpoint.

    run_dir/config.json, data.json        the resolved configuration; the data's fingerprints (run_folder.py)
    run_dir/tokenizer/                    the vocabulary
    run_dir/checkpoints/step_00000200/    tensors of the model, the momentum model and the optimizer, and state.json

A checkpoint is written under another name and renamed when it is whole and on the disk, so that a killed run leaves no
half one; files.py says what whole means, tensors.py what is in it.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from eclip.files import PARTIAL, CannotWrite, cannot_write, sha256, writing
from eclip.parallel.ranks import Ranks
from eclip.training.checkpoint.files import (
    delete,
    file_facts,
    keep_newest,
    own_files,
    put_in_place,
    step_folder,
)
from eclip.training.checkpoint.run_folder import TOKENIZER
from eclip.training.checkpoint.tensors import cause, model_tensors, optimizer_tensors

# A single rank asks for no process group; no need to be told at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


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

    Returns the checkpoint's folder. Afterwards only the `keep` newest stay, and the one with the lowest loss of the val
    split ("val_loss" in `state`). Raises CannotWrite on every rank when one could not write its part; the earlier
    checkpoints are then untouched and nothing is left of this one.
    """
    return write_checkpoint(run_dir, step, checkpoint_tensors(model, momentum, optimizer), state, ranks, keep=keep)


def checkpoint_tensors(
    model: nn.Module, momentum: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """What is saved, by name; no copies."""
    # The models' come first: FSDP2 then leaves the gathered parameters of a forward pass for its own, the optimizer's.
    return model_tensors(model, momentum) | optimizer_tensors(model, optimizer)


def write_checkpoint(
    run_dir: Path, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any], ranks: Ranks, *, keep: int
) -> Path:
    """`save_checkpoint` of tensors by name, from any thread that has `ranks.host_group` for itself."""
    partial = step_folder(run_dir, step).with_suffix(PARTIAL)
    ranks.from_main(lambda: _make_empty(partial))
    problem, facts = None, {}
    try:
        dcp.save(tensors, checkpoint_id=partial, process_group=ranks.host_group, no_dist=ranks.mesh is None)
        facts = file_facts(own_files(partial, ranks))
    except (OSError, RuntimeError, dcp.CheckpointException) as error:  # the last one is no Exception
        problem = cannot_write(partial, cause(error))
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


def _tokenizer_digest(run_dir: Path) -> str | None:
    path = run_dir / TOKENIZER
    return sha256(path) if path.is_file() else None
