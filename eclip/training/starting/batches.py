"""How many steps of which size: flags that depend on the catalogue to numbers, and the rules for these numbers."""

import dataclasses
import math

from eclip.config import RunConfig
from eclip.dataloading.parts import Parts
from eclip.objectives.objective import make_objective
from eclip.parallel.ranks import Ranks
from eclip.training.starting.sizes import EPOCHS, LEAST_PRODUCTS, fitted_batch, fitted_steps, fitted_warmup


def resolve_sizes(config: RunConfig, products: int, world_size: int) -> tuple[RunConfig, tuple[str, ...]]:
    """`config` with the batch, steps and warm-up that --fit-batch, --epochs, --fit-steps and --fit-warmup ask for.

    products: of the train split. Returns lines to print too. A pure function, so a resumed run finds the same numbers.
    """
    if config.fit_batch:
        config = _with_fitted_batch(config, products, world_size)
    notes: tuple[str, ...] = ()
    if config.epochs is not None:
        steps = config.schedule.steps(math.ceil(config.epochs * products))
        config = dataclasses.replace(config, steps=steps)
        notes += (f"--epochs {config.epochs:g} of {products} products: {steps} steps",)
    elif config.fit_steps:
        config, said = _with_fitted_steps(config, products)
        notes += (said,)
    if config.fit_warmup:
        optim = dataclasses.replace(config.optim, warmup_steps=fitted_warmup(config.steps))
        config = dataclasses.replace(config, optim=optim)
    elif config.epochs is not None and config.optim.warmup_steps >= config.steps:
        notes += (
            f"warmup_steps={config.optim.warmup_steps} of {config.steps} steps: the learning rate only rises; "
            f"--warmup-steps {max(1, fitted_warmup(config.steps))} reaches its peak early",
        )
    return config, notes


def as_begun(saved: RunConfig, config: RunConfig) -> RunConfig:
    """`config` with the batch that the run began with, where it is fitted: its catalogue is not opened yet."""
    if not (config.fit_batch and saved.fit_batch == config.fit_batch):
        return config
    return dataclasses.replace(config, global_batch_size=saved.global_batch_size)


def _with_fitted_batch(config: RunConfig, products: int, world_size: int) -> RunConfig:
    batch = fitted_batch(products, config.fit_batch)
    micro, share = config.micro_batch, max(1, batch // world_size)
    if micro is not None and micro >= share:  # the preset's, for a larger catalogue
        micro = None
    return dataclasses.replace(config, global_batch_size=batch, micro_batch=micro)


def _with_fitted_steps(config: RunConfig, products: int) -> tuple[RunConfig, str]:
    batch = config.schedule.largest
    steps = fitted_steps(products, batch)
    if steps:
        passes = config.schedule.position(steps) / products
        said = f"{products} products: batches of {batch}, {steps} steps, {passes:.1f} passes"
        return dataclasses.replace(config, steps=steps), said
    enough = config.schedule.steps(EPOCHS * products)
    if config.start_from is None:
        said = (
            f"{products} products are few to learn from ({LEAST_PRODUCTS} are the least for a shop): {enough} steps "
            f"all the same, since no --start-from brings a trained model"
        )
        return dataclasses.replace(config, steps=enough), said
    said = (
        f"{products} products are too few to train on ({LEAST_PRODUCTS} are the least): the weights of "
        f"{config.start_from} are kept as they are; --steps {enough} trains all the same"
    )
    return dataclasses.replace(config, steps=0), said


def check_batches(config: RunConfig, ranks: Ranks) -> None:
    """Raise ValueError for a size of the global batch that does not divide or is too small for the objective.

    A micro-batch larger than a rank's share does not divide it either. Also for what takes no micro-batches or no
    second rank.
    """
    if config.model.kernels == "reference" and ranks.world_size > 1:
        raise ValueError(
            f"--kernels reference compares on one rank, these are {ranks.world_size}; start without torchrun, or use "
            f"--kernels auto"
        )
    objective = make_objective(config.objective)
    if config.micro_batch is not None and not objective.splits:
        raise ValueError(
            f"--micro-batch {config.micro_batch} with --objective {config.objective.objective}: its losses cannot be "
            f"computed in parts; leave it out"
        )
    Parts(config.schedule, 0, ranks.world_size, config.micro_batch)  # raises for a size that does not divide
    for size in sorted(set(config.schedule.sizes)):
        objective.check_batch(size, config.model.num_queries)
