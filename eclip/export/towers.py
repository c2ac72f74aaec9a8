"""The two towers as folders that `transformers` loads: the tables of weights/names.py, read the other way round.

    towers/image    ViTModel; Dinov2Model where there are layer scales; CLIPVisionModel; SiglipVisionModel
    towers/text     BertModel; CLIPTextModel; SiglipTextModel

Each with config.json, model.safetensors, and what its preprocessing needs. What a tower is in transformers ends before
the projection to the common space and the instance decoder, which have no class there.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP
from eclip.model.image_encoder import PIXEL_STATISTICS
from eclip.model.settings import ModelConfig
from eclip.model.text_encoder import TEXT_EPS
from eclip.weights.names import (
    HUGGING_FACE_BERT,
    HUGGING_FACE_CLIP_IMAGE,
    HUGGING_FACE_CLIP_TEXT,
    HUGGING_FACE_VIT,
    Names,
)

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Of the tables' two spellings the files of a DINOv2 have the second one in these places.
_DINOV2_SECOND = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
_CLASSES = {"vit": "ViTModel", "clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
_TEXT_CLASSES = {"bert": "BertModel", "clip": "CLIPTextModel", "siglip": "SiglipTextModel"}
_BICUBIC = 3  # Pillow's number


def image_class(config: ModelConfig) -> str:
    """The class of transformers that is this image tower."""
    return "Dinov2Model" if config.layer_scale else _CLASSES[config.vision_architecture]


def text_class(config: ModelConfig) -> str:
    """The class of transformers that is this text tower."""
    return _TEXT_CLASSES[config.text_architecture]


def write_towers(folder: Path, model: ECLIP, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Write `folder`/image and `folder`/text. Raises ValueError for a tower that transformers has no class for."""
    config = model.config
    if config.layer_scale and config.vision_architecture != "vit":
        raise ValueError(
            f"layer_scale with vision_architecture={config.vision_architecture}: transformers has no such tower; "
            f"export with --no-towers"
        )
    image, text = folder / "image", folder / "text"
    for place in (image, text):
        place.mkdir(parents=True)
    _save(image, image_tensors(model), image_config(config))
    _write_json(image / "preprocessor_config.json", preprocessing(config))
    _save(text, text_tensors(model), text_config(config, tokenizer))
    _write_tokenizer(text, tokenizer, max_tokens)


def image_tensors(model: ECLIP) -> dict[str, Tensor]:
    """The image tower's parameters by the names of its class."""
    config, tensors = model.config, dict(model.image_encoder.state_dict())
    if config.vision_architecture == "vit":
        return renamed(tensors, HUGGING_FACE_VIT, second=_DINOV2_SECOND if config.layer_scale else ())
    for name in ("pos_embed", "cls_token"):  # (1, N, D) to (N, D), (1, 1, D) to (D,)
        if name in tensors:
            tensors[name] = tensors[name].flatten(0, 1) if name == "pos_embed" else tensors[name].flatten()
    for leaf in ("weight", "bias") if config.vision_architecture == "siglip" else ():
        parts = [tensors.pop(f"attn_pool.{part}.{leaf}") for part in ("q", "kv")]
        tensors[f"attn_pool.qkv.{leaf}"] = torch.cat(parts)
    return {f"vision_model.{name}": value for name, value in renamed(tensors, HUGGING_FACE_CLIP_IMAGE).items()}


def text_tensors(model: ECLIP) -> dict[str, Tensor]:
    """The text tower's parameters by the names of its class."""
    tensors = dict(model.text_encoder.state_dict())
    if model.config.text_architecture != "bert":
        return {f"text_model.{name}": value for name, value in renamed(tensors, HUGGING_FACE_CLIP_TEXT).items()}
    # The row of a single text's tokens is in the positions already.
    types = torch.zeros(2, model.config.text_width)
    return {**renamed(tensors, HUGGING_FACE_BERT), "embeddings.token_type_embeddings.weight": types}


def renamed(tensors: Mapping[str, Tensor], names: Names, *, second: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Every tensor by its name in a file of another program: the inverse of `WeightsFile.take`.

    names: the scheme's table. second: the ends of our names for which the second of its spellings is meant.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (target := _target(name, names, second)) is not None:
            found[target] = tensor
            continue
        stem, _, leaf = name.rpartition(".")
        assert stem.endswith("attn.qkv"), name
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            target = _target(f"{stem.removesuffix('qkv')}{part}.{leaf}", names, second)
            assert target is not None, name
            found[target] = piece
    return {name: value.detach().cpu().float().clone() for name, value in found.items()}


def _target(name: str, names: Names, second: tuple[str, ...]) -> str | None:
    """A parameter's name there; None where the table has none."""
    generic = re.sub(r"^blocks\.\d+\.", "blocks.#.", name)
    number = name.split(".")[1] if generic != name else ""
    stem, _, leaf = generic.rpartition(".")
    for key, end in ((generic, ""), (stem, f".{leaf}")):
        if key in names:
            spelling = names[key][1 if key.endswith(second) and second else 0]
            return spelling.replace("#", number) + end
    return None


def image_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the image tower."""
    width = config.vision_width
    shared = {
        "architectures": [image_class(config)],
        "hidden_size": width,
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": config.vision_heads,
        "hidden_act": _ACTIVATIONS[config.vision_activation],
        "layer_norm_eps": config.vision_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
    }
    if config.layer_scale:
        return {"model_type": "dinov2", **shared, "mlp_ratio": 4, "qkv_bias": True, "use_mask_token": False}
    kind = {"vit": "vit", "clip": "clip_vision_model", "siglip": "siglip_vision_model"}[config.vision_architecture]
    return {"model_type": kind, **shared, "intermediate_size": 4 * width}


def text_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of the text tower."""
    width, kind = config.text_width, config.text_architecture
    shared = {
        "architectures": [text_class(config)],
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": config.text_depth,
        "num_attention_heads": config.text_heads,
        "hidden_act": _ACTIVATIONS[config.text_activation],
        "layer_norm_eps": TEXT_EPS[kind],
        "max_position_embeddings": config.max_positions,
        "pad_token_id": tokenizer.pad_id,
    }
    if kind == "bert":
        return {"model_type": "bert", **shared, "type_vocab_size": 2}
    ends = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}
    return {"model_type": f"{kind}_text_model", **shared, **ends, "projection_size": width}


def preprocessing(config: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json: the whole image squashed to the square, bicubic, normalised."""
    mean, std = PIXEL_STATISTICS[config.pixel_statistics]
    side = {"height": config.image_size, "width": config.image_size}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    """tokenizer.json for all; of a WordPiece BERT's vocab.txt too, and how it reads text."""
    tokenizer.save(folder)
    told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings: dict[str, Any] = {"model_max_length": max_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    if told["model"]["type"] == "WordPiece":
        pieces = sorted(told["model"]["vocab"].items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8", newline="\n")
        specials = ("pad", "unk", "cls", "sep", "mask")
        settings["tokenizer_class"] = "BertTokenizer"
        settings |= {f"{name}_token": f"[{name.upper()}]" for name in specials}
        reading = told["normalizer"]
        settings |= {
            "do_lower_case": reading["lowercase"],
            "strip_accents": reading["strip_accents"],
            "tokenize_chinese_chars": reading["handle_chinese_chars"],
        }
    _write_json(folder / "tokenizer_config.json", settings)


def _save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
