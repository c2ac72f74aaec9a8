"""The loss of the val split while a run trains: L_itc, the mean over batches that are always the same.

The products of the split are taken once, in batches of one size that depends on their number alone; pairs and crops are
those of a fixed seed. So the numbers of a run, of a resumed one and of one on other ranks can be compared. To the
loader the split is one step, and a batch a part of it: rank r has the parts from r * K on. A rank that runs out of
batches encodes products that do not count, because FSDP gathers parameters on all ranks together.

Batches go through the towers, also where a run trains from cached features: a product costs one forward pass of each
tower and the decoding of its pair of images. Training's order, random numbers and weights are not touched.
"""

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from eclip.config import RunConfig
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.schema import Batch
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.objectives.contrast import image_text_loss, unit
from eclip.objectives.settings import ObjectiveConfig
from eclip.objectives.views import encode_view
from eclip.parallel.ranks import Ranks

_BATCH = 64
"""Least products of a batch, when the split has as many: a loss of ln 64 = 4.2 at the start, in any run."""


def open_val(config: RunConfig) -> ShardIndex:
    """The split. Raises ValueError when it cannot be read, or has too few products for a contrast."""
    try:
        index = ShardIndex.open(config.data.data_dir, "val")
    except ValueError as error:
        raise ValueError(f"--validate-every {config.validate_every}: {error}; leave it out (0)") from error
    if index.num_products < 2:
        raise ValueError(
            f"--validate-every {config.validate_every}: the val split of {config.data.data_dir} has one product, and "
            f"contrast needs two; leave it out (0)"
        )
    return index


def validation_loss(model: ECLIP, batch: Batch, config: ObjectiveConfig) -> Tensor:
    """L_itc of view a of one batch on this rank alone, with all patch tokens; a scalar."""
    view = encode_view(model, batch, None, 0, None)
    images, texts, scale = unit(view.image.cls), unit(view.text), model.scale()
    return image_text_loss(images, texts, batch, config, scale=scale, kernels=model.config.kernels, group=None)


class Validation:
    """Computes the loss of the val split when asked. All ranks call it."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, ranks: Ranks, *, stall_seconds: float) -> None:
        index = open_val(config)
        self.ranks = ranks
        self.batches = max(1, index.num_products // _BATCH)
        """Of the split. Fewer products than there are batches are left out, so that all are of one size."""
        self.batch_size = index.num_products // self.batches
        self.rounds = -(-self.batches // ranks.world_size)
        """Batches of a rank: K."""
        self._loader = ProductLoader(
            index,
            tokenizer,
            global_batch_size=self.batch_size * self.rounds * ranks.world_size,
            micro_batch=self.batch_size,
            image_size=config.model.image_size,
            seed=0,
            rank=ranks.rank,
            world_size=ranks.world_size,
            decoder="torch",  # of one result on every machine, and beside DALI's pipeline of the training's images
            num_workers=min(config.data.num_workers, self.rounds),
            stall_seconds=stall_seconds,
            crop_scale=config.data.crop_scale,
            flip=config.data.flip,
            max_tokens=config.data.max_tokens,
        )
        self._begin = self._loader.state_dict()

    def __call__(self, call: Callable[..., Any]) -> float:
        """The mean loss, the same on every rank. call: the step's module, or what wraps it for its ranks."""
        self._loader.load_state_dict(self._begin)
        mine: dict[int, float] = {}
        with closing(iter(self._loader)) as batches, torch.no_grad():  # type: ignore[type-var]  # a generator
            for _ in range(self.rounds):
                batch = next(batches)
                loss = call("validate", batch.map(lambda tensor: tensor.to(self.ranks.device)))
                mine[self.ranks.rank * self.rounds + batch.part] = loss.item()
        _reshard(call)
        found = {number: loss for part in self.ranks.gather(mine) for number, loss in part.items()}
        return math.fsum(found[number] for number in range(self.batches)) / self.batches


def _reshard(call: Callable[..., Any]) -> None:
    """FSDP2 leaves the root's parameters gathered for a backward pass, which does not come."""
    if isinstance(call, nn.Module):
        for module in call.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
