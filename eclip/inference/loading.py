"""`load`: the folder of a run, or one that was exported, to a TrainedModel."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eclip.inference.encoding import Encoder
from eclip.inference.trained import DEFAULT_THRESHOLD, TrainedModel
from eclip.objectives.objective import make_objective
from eclip.parallel.device import choose_device
from eclip.weights.exported import is_exported, read_exported

if TYPE_CHECKING:  # what reads checkpoints brings torch.distributed's, which an exported model does without
    from eclip.training.checkpoint import Weights, Which


def load(
    path: str | Path,
    device: torch.device | str = "auto",
    *,
    which: "Which" = "newest",
    weights: "Weights" = "model",
) -> TrainedModel:
    """See `eclip.load`."""
    path, chosen = Path(path), choose_device(device)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder of a run (--run-dir) or one that eclip export wrote")
    if is_exported(path):
        if (which, weights) != ("newest", "model"):
            raise ValueError(
                f"{path}: an exported folder holds one model, there is no {which} checkpoint with {weights} weights to "
                f"choose; choose when exporting (eclip export --best, --weights momentum)"
            )
        model, facts, tokenizer = read_exported(path, chosen)
        encoder = Encoder(model, tokenizer, max_tokens=facts.max_tokens, trains_decoder=facts.trains_decoder)
        return TrainedModel(encoder, source=str(path), threshold=_or_default(facts.threshold))
    from eclip.training.checkpoint import load_run

    model, config, tokenizer = load_run(path, chosen, which=which, weights=weights)
    trained = make_objective(config.objective).trains_decoder
    encoder = Encoder(model, tokenizer, max_tokens=config.data.max_tokens, trains_decoder=trained)
    return TrainedModel(encoder, source=str(path), threshold=_or_default(_of_newest(path)))


def _or_default(threshold: float | None) -> float:
    return DEFAULT_THRESHOLD if threshold is None else threshold


def _of_newest(run_dir: Path) -> float | None:
    with suppress(OSError, ValueError):
        return chosen_threshold(json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8")))
    return None


def chosen_threshold(evaluation: Any) -> float | None:
    """What an evaluation (its JSON) chose on the val split for the instance map; None where it chose none."""
    with suppress(ValueError, KeyError, TypeError):
        value = float(evaluation["tables"]["grounding"]["settings"]["thresholds"]["instance"])
        if 0 <= value < 1:
            return value
    return None
