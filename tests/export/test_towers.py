"""The towers in transformers: the same numbers from the files, whatever kind of tower it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eclip.dataloading.text import Tokenizer
from eclip.export.towers import write_towers
from eclip.model.eclip import ECLIP
from tests.model.tiny import tiny
from tests.weights.hugging_face import randomise

WORDS = ["a red chair", "the blue sofa", "green armchairs with wooden legs", "Tables, lamps und Stühle"]
DINOV2: dict[str, Any] = {"layer_scale": True}
CLIP = {"vision_architecture": "clip", "vision_activation": "quick_gelu", "vision_eps": 1e-5}
SIGLIP = {"vision_architecture": "siglip", "vision_activation": "gelu_tanh", "pixel_statistics": "half"}


def made(**changes: Any) -> ECLIP:
    model: ECLIP = randomise(ECLIP(tiny(vocab_size=128, max_positions=20, **changes)))
    return model


def loaded(kind: str, folder: Path, **options: Any) -> Any:
    """By transformers, with every tensor of the file used and none missing."""
    import transformers

    found, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return found.eval()


@pytest.mark.parametrize(
    "kind, changes",
    [("ViTModel", {}), ("Dinov2Model", DINOV2), ("CLIPVisionModel", CLIP), ("SiglipVisionModel", SIGLIP)],
)
def test_an_image_tower_is_reproduced(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = made(**changes)
    write_towers(tmp_path, model, Tokenizer.train(WORDS, 128), 12)
    theirs = loaded(kind, tmp_path / "image", **({"add_pooling_layer": False} if kind == "ViTModel" else {}))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        ours = model.image_tower(pixels)
        found = theirs(model.image_encoder.normalise(pixels))
    tokens = found.last_hidden_state
    if kind == "CLIPVisionModel":  # its last norm is the pooled token's alone
        torch.testing.assert_close(found.pooler_output, ours[:, 0], rtol=1e-5, atol=1e-5)
        tokens = getattr(theirs, "vision_model", theirs).post_layernorm(tokens)
    elif kind == "SiglipVisionModel":
        tokens = torch.cat([found.pooler_output[:, None], tokens], dim=1)
    torch.testing.assert_close(tokens, ours, rtol=1e-5, atol=1e-5)


def test_an_image_is_prepared_as_here(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    from eclip.inference import read_picture

    model = made(**DINOV2)
    write_towers(tmp_path, model, Tokenizer.train(WORDS, 128), 12)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "image", use_fast=False)
    picture = Image.linear_gradient("L").convert("RGB").resize((50, 40))
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    ours = model.image_encoder.normalise(read_picture(picture, 32).square[None])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)  # a step of 8 bits is 0.017


def padded(tokens: Tensor, cu_seqlens: Tensor, fill: int) -> dict[str, Tensor]:
    rows = [tokens[a:b] for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    mask = torch.arange(ids.shape[1]) < cu_seqlens.diff()[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_bert_is_reproduced_with_its_tokenizer(pooling: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.train(WORDS, 128)
    model = made(text_pooling=pooling)
    write_towers(tmp_path, model, tokenizer, 12)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "text")(
        WORDS, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    tokens, bounds = tokenizer.encode(WORDS, 12)
    assert torch.equal(inputs["input_ids"], padded(tokens, bounds, tokenizer.pad_id)["input_ids"])
    with torch.no_grad():
        hidden = loaded("BertModel", tmp_path / "text", add_pooling_layer=False)(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(pooled, model.text_tower(tokens, bounds), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "text" / "vocab.txt").read_text(encoding="utf-8").startswith("[PAD]\n[UNK]\n[CLS]\n")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_text_tower_of_clip_and_siglip_is_reproduced(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(WORDS, 128)
    activation = {"clip": "quick_gelu", "siglip": "gelu_tanh"}[kind]
    model = made(text_architecture=kind, text_activation=activation, text_pooling="last")
    write_towers(tmp_path, model, tokenizer, 12)
    name = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel"}[kind]
    if kind == "clip":
        tokens, bounds = tokenizer.encode(WORDS, 12)
    else:  # as its tokenizer pads, to the last position
        tokens, bounds = torch.randint(0, 128, (60,)), torch.tensor([0, 20, 40, 60], dtype=torch.int32)
    with torch.no_grad():
        found = loaded(name, tmp_path / "text")(**padded(tokens, bounds, tokenizer.pad_id))
        torch.testing.assert_close(found.pooler_output, model.text_tower(tokens, bounds), rtol=1e-5, atol=1e-5)


def test_a_tower_that_transformers_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer_scale with vision_architecture=clip: .*--no-towers"):
        write_towers(tmp_path, made(layer_scale=True, **CLIP), Tokenizer.train(WORDS, 128), 12)


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    write_towers(tmp_path, made(), Tokenizer.train(WORDS, 128), 12)
    config = json.loads((tmp_path / "image" / "config.json").read_text())
    assert (config["architectures"], config["layer_norm_eps"]) == (["ViTModel"], 1e-6)
    settings = json.loads((tmp_path / "text" / "tokenizer_config.json").read_text())
    assert settings["do_lower_case"] is True and settings["model_max_length"] == 12
