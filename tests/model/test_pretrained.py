"""Weights of Hugging Face models give our encoders the same outputs; files that do not fit are refused by key."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclip.model.image_encoder import ImageEncoder
from eclip.model.pretrained import interpolate_positions, load_image_weights, load_text_weights
from eclip.model.text_encoder import TextEncoder
from tests.model.tiny import hugging_face_bert, hugging_face_dinov2, hugging_face_vit, tiny

LENGTHS = (4, 1, 9, 6)


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
        ({}, add("embeddings.register_tokens"), "embeddings.register_tokens .* has no place"),
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


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_image_weights(ImageEncoder(tiny()), path)
    with pytest.raises(ValueError, match="holds no tower of a known kind"):
        load_image_weights(ImageEncoder(tiny()), saved(hugging_face_bert(), tmp_path))


def test_positions_of_no_square_grid_are_refused():
    with pytest.raises(ValueError, match=r"expected \(1, 1\+M\*M, D\)"):
        interpolate_positions(torch.zeros(1, 12, 4), 3)
