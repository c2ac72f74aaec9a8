"""Weights of Hugging Face models give our encoders the same outputs; files that do not fit are refused by key."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder
from eclip.weights.pretrained import interpolate_positions, load_image_weights, load_text_weights
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


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_image_weights(ImageEncoder(tiny()), path)
    with pytest.raises(ValueError, match="it holds a text tower, for --text-weights$"):
        load_image_weights(ImageEncoder(tiny()), saved(hugging_face_bert(), tmp_path))
    with pytest.raises(ValueError, match="it holds an image tower, for --image-weights$"):
        load_text_weights(TextEncoder(tiny()), saved(hugging_face_vit(), tmp_path))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["vision_model.embeddings.patch_embedding.weight"], "Hugging Face's CLIP or SigLIP, which is not read"),
        (["visual.conv1.weight", "visual.class_embedding"], "OpenAI's or open_clip's CLIP, which is not read"),
        (["a", "b.c", "d", "e"], "no tower of a known kind, a, b.c, d$"),
        ([], "no tower of a known kind, nothing$"),
    ],
)
def test_towers_of_other_kinds_are_told(tmp_path, names, words):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    with pytest.raises(ValueError, match=words):
        load_image_weights(ImageEncoder(tiny()), path)


@pytest.mark.parametrize("part", [0, 1])
def test_weights_in_parts_or_behind_links(tmp_path, part):
    vit = hugging_face_vit()
    vit.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    parts = sorted((tmp_path / "parts").glob("model-*-of-*.safetensors"))
    for path, words in (
        (parts[part], "it is one of several parts; give one .safetensors file"),
        (tmp_path / "parts", f"a folder; give the weights file itself, such as {parts[0]}"),
        (tmp_path / "nowhere", "absent"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            load_image_weights(ImageEncoder(tiny()), path)
        assert "\n" not in str(error.value)
    save_file({name: value for path in parts for name, value in load_file(path).items()}, tmp_path / "blob")
    (tmp_path / "link.safetensors").symlink_to("blob")
    load_image_weights(ImageEncoder(tiny()), tmp_path / "link.safetensors")


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


def two(folder, *prefixes):
    """A file of several image towers of other weights, and a head."""
    state = {"head.weight": torch.zeros(2, 2)}
    for i, prefix in enumerate(prefixes):
        for name, value in hugging_face_dinov2().state_dict().items():
            state[f"{prefix}{name}"] = value + i
    path = folder / "towers.safetensors"
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("prefixes", "tower", "taken"),
    [
        (("student.", "teacher."), "teacher", 1),
        (("student.", "teacher."), "student.", 0),
        (("student.backbone.", "teacher.backbone."), "teacher", 1),
        (("encoder_q.", "encoder_k."), "encoder_q", 0),
        (("module.model.", "module.ema."), "module.ema", 1),
        (("vit.", "vit.ema."), "vit", 0),
        (("", "teacher."), "teacher", 1),
        (("module.model.vit.",), None, 0),
        (("student.",), "student", 0),
    ],
)
def test_one_tower_of_several(tmp_path, prefixes, tower, taken):
    ours, plain = ImageEncoder(tiny(layer_scale=True)), ImageEncoder(tiny(layer_scale=True))
    load_image_weights(ours, two(tmp_path, *prefixes), tower=tower)
    load_image_weights(plain, saved(hugging_face_dinov2(), tmp_path))
    torch.testing.assert_close(ours.cls_token, plain.cls_token + taken)
    torch.testing.assert_close(ours.blocks[1].mlp.fc2.weight, plain.blocks[1].mlp.fc2.weight + taken)


@pytest.mark.parametrize(
    ("prefixes", "tower", "words"),
    [
        (("student.", "teacher."), None, r"holds student \(43 tensors\), teacher \(43 tensors\); say which"),
        (("student.", "teacher."), "ema", r"no tower 'ema'; it holds student \(43 tensors\), teacher"),
        (("student.a.", "student.b."), "student", r"holds student.a \(43 tensors\), student.b"),
        (("", "teacher."), None, r"holds '' \(44 tensors\), teacher \(43 tensors\)"),
        (("vit.", "vit.ema."), None, r"holds vit \(43 tensors\), vit.ema \(43 tensors\)"),
    ],
)
def test_towers_are_listed(tmp_path, prefixes, tower, words):
    with pytest.raises(ValueError, match=f"towers.safetensors: .*{words}.*--image-tower$"):
        load_image_weights(ImageEncoder(tiny(layer_scale=True)), two(tmp_path, *prefixes), tower=tower)


def test_image_and_text_tower_in_one_file(tmp_path):
    state = {f"vision_model.{n}": v for n, v in hugging_face_vit().state_dict().items()}
    state |= {f"text_model.{n}": v for n, v in hugging_face_bert().state_dict().items()}
    save_file(state, tmp_path / "dual.safetensors")
    load_image_weights(ImageEncoder(tiny()), tmp_path / "dual.safetensors")
    load_text_weights(TextEncoder(tiny()), tmp_path / "dual.safetensors")
    with pytest.raises(ValueError, match="no tower 'vision_model'; it holds text_model .*--text-tower"):
        load_text_weights(TextEncoder(tiny()), tmp_path / "dual.safetensors", tower="vision_model")


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_weights_that_are_no_numbers(tmp_path, bad, name):
    before = TextEncoder(tiny())
    kept = {n: v.clone() for n, v in before.state_dict().items()}
    path = saved(hugging_face_bert(), tmp_path, edit=lambda state: state[name].view(-1)[7:9].fill_(bad))
    with pytest.raises(ValueError, match=f"weights.safetensors: 2 of .* values of {name} are NaN or infinite"):
        load_text_weights(before, path)
    assert all(torch.equal(v, kept[n]) for n, v in before.state_dict().items())


def test_quantised_weights(tmp_path):
    def cast(state):
        state["encoder.layer.0.output.dense.weight"] = torch.zeros(24, 96, dtype=torch.int8)

    with pytest.raises(ValueError, match="encoder.layer.0.output.dense.weight is int8: quantised"):
        load_text_weights(TextEncoder(tiny()), saved(hugging_face_bert(), tmp_path, edit=cast))


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


def broken(damage):
    """A file of a tower, with its bytes changed."""

    def write(folder):
        path = saved(hugging_face_vit(), folder)
        path.write_bytes(damage(path.read_bytes()))
        return path

    return write


def pickled(folder, **options):
    path = folder / "weights.bin"
    torch.save(hugging_face_vit().state_dict(), path, **options)
    return path


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (pickled, "a PyTorch file .*save_file"),
        (lambda folder: pickled(folder, _use_new_zipfile_serialization=False), "a PyTorch file"),
        (broken(lambda data: b"<!DOCTYPE html><html>not found</html>"), "a web page.*download it again"),
        (broken(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
        (broken(lambda data: b""), "empty.*download"),
        (broken(lambda data: bytes(5000)), "zeros"),
        (broken(lambda data: data[:300]), r"truncated: its header alone has \d+ bytes, the file 300"),
        (broken(lambda data: data[:-10]), r"not a readable safetensors file \(.*download it again"),
        (broken(lambda data: json.dumps({"weight_map": {}}).encode()), "several files"),
        (broken(lambda data: b"GGUF" + bytes(100)), "GGUF"),
        (broken(lambda data: b"\x93NUMPY junk" * 50), "not a readable safetensors file"),
    ],
)
def test_what_is_no_weights_file_is_told(tmp_path, write, words):
    path = write(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        load_image_weights(ImageEncoder(tiny()), path)
    assert str(error.value).startswith(f"{path}: not a readable safetensors file") and "\n" not in str(error.value)


def test_positions_of_no_square_grid_are_refused():
    with pytest.raises(ValueError, match=r"expected \(1, 1\+M\*M, D\)"):
        interpolate_positions(torch.zeros(1, 12, 4), 3)
