"""A model small enough for every test."""

import dataclasses

from eclip.model.settings import ModelConfig

TINY = ModelConfig(
    image_size=32, patch_size=8, vision_width=32, vision_depth=2, vision_heads=4,
    vocab_size=50, text_width=24, text_depth=2, text_heads=3, max_positions=16,
    embed_dim=16, num_queries=5, decoder_depth=3, decoder_heads=4,
)  # fmt: skip


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)
