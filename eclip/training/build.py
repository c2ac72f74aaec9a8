"""What a run is made of, out of its settings: the model, the cache of its locked towers, the loader of its batches."""

import torch
import torch.distributed as dist

from eclip.config import RunConfig
from eclip.dataloading.loader import ProductLoader
from eclip.dataloading.system.console import say
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.parallel.ranks import Ranks
from eclip.training.feature_cache.cache import FeatureCache, cache_folder
from eclip.training.optim import lock_towers
from eclip.training.prepare import Prepared
from eclip.training.starting.start_from import load_start
from eclip.training.validation import Validation
from eclip.weights.pretrained import load_image_weights, load_text_weights
from eclip.weights.projections import start_projections


def build_model(config: RunConfig, *, pretrained: bool = True) -> ECLIP:
    """The model on CPU, the same on every rank: seeded, pretrained weights loaded, what does not train locked.

    pretrained: False leaves the towers' files and --start-from alone, for a model that a checkpoint fills. What else
    than the towers starts from a CLIP's file is printed.
    """
    torch.manual_seed(config.seed)
    model = ECLIP(config.model)
    image = text = None
    if pretrained and config.image_weights is not None:
        image = load_image_weights(model.image_encoder, config.image_weights, tower=config.image_tower)
    if pretrained and config.text_weights is not None:
        text = load_text_weights(model.text_encoder, config.text_weights, tower=config.text_tower)
    for line in start_projections(model, image, text):
        if not dist.is_initialized() or dist.get_rank() == 0:
            say(line)
    if pretrained and config.start_from is not None:
        load_start(config.start_from, model)
    lock_towers(model, config)
    make_objective(config.objective).lock_unused(model)
    return model


def open_cache(model: ECLIP, prepared: Prepared, ranks: Ranks) -> FeatureCache | None:
    """The cache of the locked towers' outputs, beside the shards: runs on one catalogue share it.

    All ranks fill it together, through the file: nobody waits in a collective meanwhile.
    """
    config = prepared.config
    if not config.cache_features or config.steps == 0:  # nothing will be trained
        return None
    return FeatureCache.build_or_open(
        cache_folder(config),
        model,
        prepared.index,
        prepared.tokenizer,
        config,
        views=config.cached_views,
        device=ranks.device,
        progress=ranks.is_main,
    )


def stall_limit(config: RunConfig, world_size: int) -> float:
    """Seconds after which a loader without a batch stops the run; 0: never.

    Other ranks wait for this one's batch in a collective, whose error could not name the cause: the loader is earlier.
    """
    limit = config.data.stall_seconds
    return limit if world_size == 1 else min(limit, config.rank_timeout_seconds / 2)


def open_validation(prepared: Prepared, ranks: Ranks) -> Validation | None:
    """With --validate-every."""
    config = prepared.config
    if not config.validate_every:
        return None
    return Validation(config, prepared.tokenizer, ranks, stall_seconds=stall_limit(config, ranks.world_size))


def make_loader(prepared: Prepared, ranks: Ranks) -> ProductLoader:
    """This rank's share of every batch; without pixels where the features of images are cached."""
    config = prepared.config
    return ProductLoader(
        prepared.index,
        prepared.tokenizer,
        global_batch_size=config.schedule,
        micro_batch=config.micro_batch,
        image_size=config.model.image_size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        decoder="none" if config.cache_features else config.data.decoder,
        num_workers=config.data.num_workers,
        stall_seconds=stall_limit(config, ranks.world_size),
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        max_tokens=config.data.max_tokens,
    )
