"""The model of a run without its files: random weights, locked as its settings say."""

import torch

from eclip.config import RunConfig
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.training.optim import lock_towers


def random_model(config: RunConfig) -> ECLIP:
    """On the CPU, seeded. training/build.py, which does the same, also knows data and needs what reads them."""
    torch.manual_seed(config.seed)
    model = ECLIP(config.model)
    lock_towers(model, config)
    make_objective(config.objective).lock_unused(model)
    return model
