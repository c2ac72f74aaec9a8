"""Hugging Face models with random weights, of the shapes of tests/model/tiny.py, and their files."""

import re

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


def hugging_face_clip(vision=(), text=(), dimensions=16, hidden_act="quick_gelu"):
    """A CLIPModel; `vision`, `text`: changes of either tower."""
    from transformers import CLIPConfig, CLIPModel

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    image = {**shape, "image_size": 32, "patch_size": 8, "hidden_act": hidden_act, **dict(vision)}
    words = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, vocab_size=50)
    words |= dict(max_position_embeddings=20, eos_token_id=49, bos_token_id=48, hidden_act=hidden_act)
    config = CLIPConfig(vision_config=image, text_config={**words, **dict(text)}, projection_dim=dimensions)
    model = randomise(CLIPModel(config))
    model.logit_scale.data.fill_(3.0)
    return model


def hugging_face_siglip(vision=(), text=()):
    from transformers import SiglipConfig, SiglipModel

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    image = {**shape, "image_size": 32, "patch_size": 8, **dict(vision)}
    words = {**shape, "vocab_size": 50, "max_position_embeddings": 12, **dict(text)}
    return randomise(SiglipModel(SiglipConfig(vision_config=image, text_config=words)))


_OPENAI = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"vision_model\.post_layernorm", "visual.ln_post"),
    (r"vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"text_model\.encoder\.layers", "transformer.resblocks"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"text_model\.head", "text_projection"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)


def openai_names(state):
    """A CLIPModel's tensors as OpenAI and open_clip name and turn them."""
    renamed = {}
    for name, value in state.items():
        if "self_attn.q_proj" in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, value = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(parts)
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        elif name == "visual_projection.weight":
            name, value = "visual.proj", value.T
        elif name == "text_projection.weight":
            name, value = "text_projection", value.T
        for pattern, replacement in _OPENAI:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value.contiguous()
    return renamed
