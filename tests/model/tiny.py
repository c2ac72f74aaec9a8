"""A model small enough for every test, and Hugging Face models of its shapes with random weights."""

import dataclasses

import torch

from eclip.config import ModelConfig

TINY = ModelConfig(
    image_size=32, patch_size=8, vision_width=32, vision_depth=2, vision_heads=4,
    vocab_size=50, text_width=24, text_depth=2, text_heads=3, max_positions=16,
    embed_dim=16, num_queries=5, decoder_depth=3, decoder_heads=4,
)  # fmt: skip


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def randomise(model):
    """Fill every parameter, biases and norms too: at their usual start (0 and 1) a swap of two would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("lambda1") or ("norm" in name.lower() and name.endswith("weight"))
            parameter.copy_(1 + 0.2 * noise if is_scale else 0.2 * noise)
    return model.eval()


def hugging_face_vit(**changes):
    from transformers import ViTConfig, ViTModel

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    return randomise(ViTModel(ViTConfig(**{**shape, "image_size": 32, "patch_size": 8, **changes})))


def hugging_face_dinov2(**changes):
    from transformers import Dinov2Config, Dinov2Model

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=4)
    return randomise(Dinov2Model(Dinov2Config(**{**shape, "image_size": 32, "patch_size": 8, **changes})))


def hugging_face_bert(**changes):
    from transformers import BertConfig, BertModel

    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, vocab_size=50)
    return randomise(BertModel(BertConfig(**{**shape, "max_position_embeddings": 20, **changes})))
