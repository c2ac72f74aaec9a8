"""Weights of Hugging Face models give our encoders the same outputs; towers that do not fit are refused by key."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder
from eclip.weights.pretrained import interpolate_positions, load_image_weights, load_text_weights
from tests.model.tiny import tiny
from tests.weights.hugging_face import hugging_face_bert, hugging_face_dinov2, hugging_face_vit, saved

LENGTHS = (4, 1, 9, 6)


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("prefix", ["", "vit."])
@torch.no_grad()
def test_vit(tmp_path, on_disk, prefix):
    theirs = hugging_face_vit()
    ours = ImageEncoder(tiny(vision_eps=1e-12))
    load_image_weights(ours, saved(theirs, tmp_path, prefix=prefix, on_disk=on_disk))
    torch.testing.assert_close(ours(images()), theirs(images()).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on_disk", [False, True])
@torch.no_grad()
def test_dinov2(tmp_path, on_disk):
    theirs = hugging_face_dinov2()
    ours = ImageEncoder(tiny(layer_scale=True))
    load_image_weights(ours, saved(theirs, tmp_path, on_disk=on_disk))
    torch.testing.assert_close(ours(images()), theirs(images()).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [24, 56])
@torch.no_grad()
def test_dinov2_at_another_size_resamples_positions(tmp_path, size):
    theirs = hugging_face_dinov2()
    ours = ImageEncoder(tiny(layer_scale=True, image_size=size))
    load_image_weights(ours, saved(theirs, tmp_path))
    torch.testing.assert_close(ours(images(size)), theirs(images(size)).last_hidden_state, rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm(tmp_path):
    """timm's ViT is written out in the test: its names, its fused qkv, its order of operations."""
    torch.manual_seed(0)
    d, heads, f = 32, 4, torch.nn.functional
    shapes = {
        "cls_token": (1, 1, d), "pos_embed": (1, 17, d), "norm.weight": (d,), "norm.bias": (d,),
        "patch_embed.proj.weight": (d, 3, 8, 8), "patch_embed.proj.bias": (d,),
        "head.weight": (7, d), "head.bias": (7,),
    }  # fmt: skip
    for i in range(2):
        for name, out, into in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("mlp.fc1", 4 * d, d),
            ("mlp.fc2", d, 4 * d),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (d,), f"blocks.{i}.{name}.bias": (d,)}
    w = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(w, tmp_path / "timm.safetensors")

    def affine(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    x = f.conv2d(images(), *affine("patch_embed.proj"), stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(2, -1, -1), x], 1) + w["pos_embed"]
    for i in range(2):
        y = f.layer_norm(x, (d,), *affine(f"blocks.{i}.norm1"), 1e-6)
        qkv = f.linear(y, *affine(f"blocks.{i}.attn.qkv")).reshape(2, 17, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        y = ((qkv[0] @ qkv[1].transpose(-1, -2)) / (d // heads) ** 0.5).softmax(-1) @ qkv[2]
        x = x + f.linear(y.transpose(1, 2).reshape(2, 17, d), *affine(f"blocks.{i}.attn.proj"))
        y = f.linear(f.layer_norm(x, (d,), *affine(f"blocks.{i}.norm2"), 1e-6), *affine(f"blocks.{i}.mlp.fc1"))
        x = x + f.linear(f.gelu(y), *affine(f"blocks.{i}.mlp.fc2"))
    expected = f.layer_norm(x, (d,), *affine("norm"), 1e-6)

    ours = ImageEncoder(tiny())
    load_image_weights(ours, tmp_path / "timm.safetensors")
    torch.testing.assert_close(ours(images()), expected, rtol=0, atol=1e-5)


def texts(vocab=50):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab, (length,), generator=generator) for length in LENGTHS]


def packed():
    return torch.cat(texts()), torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("prefix", ["", "bert."])
@torch.no_grad()
def test_bert(tmp_path, pooling, prefix):
    theirs = hugging_face_bert()
    ours = TextEncoder(tiny(text_pooling=pooling))
    load_text_weights(ours, saved(theirs, tmp_path, prefix=prefix))
    hidden = [theirs(text[None]).last_hidden_state[0] for text in texts()]
    expected = torch.stack([h[0] if pooling == "cls" else h.mean(0) for h in hidden])
    torch.testing.assert_close(ours(*packed()), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bert_with_tensorflow_names_and_heads(tmp_path):
    def edit(state):
        for name in [n for n in state if "LayerNorm" in n]:
            renamed = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state[renamed] = state.pop(name)
        state["cls.predictions.bias"] = torch.zeros(50)
        state["bert.embeddings.position_ids"] = torch.arange(20)[None]

    theirs = hugging_face_bert()
    ours = TextEncoder(tiny())
    load_text_weights(ours, saved(theirs, tmp_path, prefix="bert.", edit=edit))
    expected = torch.stack([theirs(text[None]).last_hidden_state[0, 0] for text in texts()])
    torch.testing.assert_close(ours(*packed()), expected, rtol=0, atol=1e-5)


def test_own_towers_reload(tmp_path):
    for encoder_class, load in ((ImageEncoder, load_image_weights), (TextEncoder, load_text_weights)):
        first, second = encoder_class(tiny()), encoder_class(tiny())
        save_file(first.state_dict(), tmp_path / "own.safetensors")
        load(second, tmp_path / "own.safetensors")
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name


def drop(name):
    return lambda state: state.pop(name)


def add(name):
    return lambda state: state.update({name: torch.zeros(3)})


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({}, drop("encoder.layer.1.attention.k_proj.bias"), "no encoder.layer.1.attention.attention.key.bias or"),
        ({}, drop("layernorm.weight"), "no layernorm.weight"),
        ({}, drop("embeddings.position_embeddings"), "no embeddings.position_embeddings"),
        ({}, add("embeddings.register_tokens"), "embeddings.register_tokens has no place"),
        ({"vision_depth": 1}, None, "encoder.layer.1.* has no place"),
        ({"vision_depth": 3}, None, "no encoder.layer.2."),
        ({"layer_scale": False}, None, "layer_scale1.lambda1 .* has no place"),
        ({"vision_width": 64}, None, r"cls_token has shape \(1, 1, 32\), the configuration asks for \(1, 1, 64\)"),
        ({"patch_size": 4}, None, "patch_embed.proj.weight has shape"),
    ],
)
def test_image_files_that_do_not_fit(tmp_path, changes, edit, message):
    ours = ImageEncoder(tiny(**{"layer_scale": True, **changes}))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_image_weights(ours, saved(hugging_face_dinov2(), tmp_path, edit=edit))
    assert str(error.value).count("weights.safetensors") == 1
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({}, drop("encoder.layer.0.output.LayerNorm.bias"), "no encoder.layer.0.output.LayerNorm.bias"),
        ({}, drop("embeddings.token_type_embeddings.weight"), "no embeddings.token_type_embeddings.weight"),
        ({"vocab_size": 60}, None, r"word_embedding.weight has shape \(50, 24\).*vocab_size"),
        ({"max_positions": 30}, None, r"position_embedding.weight has shape \(20, 24\).*max_positions"),
        ({"text_depth": 1}, None, "encoder.layer.1.* has no place"),
    ],
)
def test_text_files_that_do_not_fit(tmp_path, changes, edit, message):
    with pytest.raises(ValueError, match=message):
        load_text_weights(TextEncoder(tiny(**changes)), saved(hugging_face_bert(), tmp_path, edit=edit))


@pytest.mark.parametrize("extra", [1, 6, 14, 78, 1000])
@torch.no_grad()
def test_padded_embedding_is_cut_and_said(tmp_path, caplog, extra):
    """A published 30522 becomes 30528 rows, a multiple of 64, to suit a GPU."""

    def pad(state):
        state["embeddings.word_embeddings.weight"] = torch.cat(
            [state["embeddings.word_embeddings.weight"], torch.full((extra, 24), 9.0)]
        )

    theirs, ours = hugging_face_bert(), TextEncoder(tiny())
    load_text_weights(ours, saved(theirs, tmp_path, edit=pad))
    assert torch.equal(ours.word_embedding.weight, theirs.embeddings.word_embeddings.weight)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{50 + extra} rows of the word embedding for 50 pieces" in record.message and "\n" not in record.message


@pytest.mark.parametrize("rows", [0, 1, 49, 50 + 1024, 5000])
def test_embedding_of_another_vocabulary_is_refused(tmp_path, rows):
    def edit(state):
        state["embeddings.word_embeddings.weight"] = torch.zeros(rows, 24)

    with pytest.raises(ValueError, match=rf"{rows} rows for vocab_size=50 pieces; give the --vocab-file"):
        load_text_weights(TextEncoder(tiny()), saved(hugging_face_bert(), tmp_path, edit=edit))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    def cast(state):
        state.update({name: value.to(dtype) for name, value in state.items()})

    theirs, ours = hugging_face_bert(), TextEncoder(tiny())
    load_text_weights(ours, saved(theirs, tmp_path, edit=cast))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    expected = theirs.embeddings.position_embeddings.weight.to(dtype).float()[:16]
    expected = expected + theirs.embeddings.token_type_embeddings.weight.to(dtype).float()[0]
    assert torch.equal(ours.position_embedding.weight, expected)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("embeddings.token_type_embeddings.weight", (0, 24), r"token_type_embeddings.weight has shape \(0, 24\)"),
        ("embeddings.token_type_embeddings.weight", (2, 12), r"token_type_embeddings.weight has shape \(2, 12\)"),
        ("embeddings.word_embeddings.weight", (50,), r"word_embedding.weight has shape \(50,\)"),
        ("encoder.layer.0.attention.self.key.weight", (12, 24), r"shapes \(24, 24\), \(12, 24\), \(24, 24\)"),
        ("embeddings.LayerNorm.weight", (23,), r"norm.weight has shape \(23,\), the configuration asks for \(24,\)"),
    ],
)
def test_wrong_shapes_are_named(tmp_path, name, shape, words):
    with pytest.raises(ValueError, match=words):
        load_text_weights(
            TextEncoder(tiny()),
            saved(hugging_face_bert(), tmp_path, edit=lambda s: s.update({name: torch.zeros(shape)})),
        )


def test_positions_of_no_square_grid_are_refused():
    with pytest.raises(ValueError, match=r"expected \(1, 1\+M\*M, D\)"):
        interpolate_positions(torch.zeros(1, 12, 4), 3)
