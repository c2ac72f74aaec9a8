"""`load`: the folder of a run, or one that was exported, to a TrainedModel."""

import json
from contextlib import suppress
from pathlib import Path

import torch

from eclip.evaluate.inputs import choose_device
from eclip.inference.encoding import Encoder
from eclip.inference.trained import DEFAULT_THRESHOLD, TrainedModel
from eclip.objectives.objective import make_objective
from eclip.training.checkpoint import Weights, Which, load_run


def load(
    path: str | Path,
    device: torch.device | str = "auto",
    *,
    which: Which = "newest",
    weights: Weights = "model",
) -> TrainedModel:
    """See `eclip.load`."""
    path, chosen = Path(path), choose_device(device)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder of a run (--run-dir) or one that eclip export wrote")
    model, config, tokenizer = load_run(path, chosen, which=which, weights=weights)
    trained = make_objective(config.objective).trains_decoder
    encoder = Encoder(model, tokenizer, max_tokens=config.data.max_tokens, trains_decoder=trained)
    return TrainedModel(encoder, source=str(path), threshold=_chosen_threshold(path))


def _chosen_threshold(path: Path) -> float:
    """What the run's evaluation chose on the val split for the instance map, where there was one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
        value = float(record["tables"]["grounding"]["settings"]["thresholds"]["instance"])
        if 0 <= value < 1:
            return value
    return DEFAULT_THRESHOLD
