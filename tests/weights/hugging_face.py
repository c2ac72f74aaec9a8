"""Hugging Face models with random weights, of the shapes of tests/model/tiny.py, and their files."""

import torch
from safetensors.torch import load_file, save_file


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


def saved(model, folder, *, prefix="", edit=None, on_disk=False):
    """The model's weights as a safetensors file: its modules' names, or (on_disk) those save_pretrained writes."""
    path = folder / "weights.safetensors"
    if on_disk:
        model.save_pretrained(folder / "hub")
        state = load_file(folder / "hub" / "model.safetensors")
    else:
        state = model.state_dict()
    state = {prefix + name: value.clone() for name, value in state.items()}
    if edit:
        edit(state)
    save_file(state, path)
    return path
