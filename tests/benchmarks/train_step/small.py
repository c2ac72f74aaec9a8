"""A run whose steps take milliseconds."""

import dataclasses
from typing import Any

import torch

from eclip.config import DataConfig, RunConfig
from eclip.model.settings import ModelConfig

CPU = torch.device("cpu")
SMALL = RunConfig(
    global_batch_size=12,
    model=ModelConfig(
        image_size=32,
        patch_size=8,
        vision_width=32,
        vision_depth=2,
        vision_heads=2,
        vocab_size=256,
        text_width=16,
        text_depth=2,
        text_heads=2,
        max_positions=24,
        embed_dim=32,
        num_queries=4,
        decoder_depth=2,
        decoder_heads=2,
    ),
    data=DataConfig(max_tokens=24),
)


def cached(config: RunConfig, **changes: Any) -> RunConfig:
    """The same with locked towers, whose features a step is given."""
    return dataclasses.replace(config, lock_image=True, lock_text=True, cache_features=True, **changes)
