"""The model of a run without its files: random weights, locked as its settings say."""

import torch

from eclip.config import RunConfig
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.training.optim import lock_towers


def random_model(config: RunConfig, device: torch.device) -> ECLIP:
    """Seeded, made on `device`. training/build.py, which does the like, knows data too and needs what reads them."""
    torch.manual_seed(config.seed)
    with device:
        model = ECLIP(config.model)
    lock_towers(model, config)
    make_objective(config.objective).lock_unused(model)
    return model
