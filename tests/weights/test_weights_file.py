"""Which file it is and which tower of it; files of another kind, broken ones and odd numbers are told in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder
from eclip.weights.pretrained import load_image_weights, load_text_weights
from tests.model.tiny import tiny
from tests.weights.hugging_face import hugging_face_bert, hugging_face_dinov2, hugging_face_vit, saved


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
        (["text_model.embeddings.token_embedding.weight"], "a text tower, for --text-weights$"),
        (["ln_final.weight", "token_embedding.weight"], "a text tower, for --text-weights$"),
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
