"""The tensors of a checkpoint: their names, and whether a model is the one that they were written for.

They are keyed `model.NAME`, `momentum.NAME` (parts shared with the model left out) and `optimizer.NAME.KEY`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from eclip.training.optim import fresh_state


def model_tensors(model: nn.Module, momentum: nn.Module | None) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if momentum is not None:
        own = {name for name, p in model.named_parameters()}
        shared = {n for n, p in momentum.named_parameters() if n in own and p is model.get_parameter(n)}
        tensors |= {f"momentum.{n}": v for n, v in momentum.state_dict().items() if n not in shared}
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def empty_optimizer_state(
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


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(unreadable(path / ".metadata", error)) from error
    return {key: tuple(entry.size) for key, entry in metadata.items() if hasattr(entry, "size")}


def require_fit(
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


def unreadable(path: Path, error: BaseException) -> str:
    reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return f"{path}: cannot be read ({reason}); remove the folder to take the checkpoint before"


def cause(error: BaseException) -> BaseException:
    """The first rank's own error in what torch.distributed.checkpoint raises on all."""
    if isinstance(error, dcp.CheckpointException):
        return next((cause(failure[0]) for _, failure in sorted(error.failures.items())), error)
    return error
