"""ONNX files against the model, for every kind of tower, with onnxruntime."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eclip.dataloading.text import Tokenizer
from eclip.export import onnx_files
from eclip.export.onnx_files import TOLERANCE, write_onnx
from eclip.inference.encoding import IMAGE, Encoder
from eclip.model.eclip import ECLIP
from tests.export.test_towers import CLIP, DINOV2, SIGLIP, WORDS, made

KINDS: dict[str, dict[str, Any]] = {
    "dinov2, mean, several slot heads": {**DINOV2, "text_pooling": "mean", "slot_heads": 8, "normalize": "mean"},
    "clip": {**CLIP, "text_architecture": "clip", "text_activation": "quick_gelu", "text_pooling": "last"},
    "siglip": {**SIGLIP, "text_architecture": "siglip", "text_activation": "gelu_tanh", "text_pooling": "last"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_agrees(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([*WORDS, *onnx_files._TEXTS], 128)
    if kind == "siglip":  # all of one length
        tokenizer.padded = True
    written = write_onnx(tmp_path / "onnx", made(**KINDS[kind]), tokenizer, 20, decoder=True)
    assert [file.name for file in written] == ["image.onnx", "text.onnx", "decoder.onnx"]
    assert all(0 < file.error < TOLERANCE / 10 for file in written), written
    assert [file.size for file in written] == [(tmp_path / "onnx" / file.name).stat().st_size for file in written]


@pytest.fixture(scope="module")
def model() -> ECLIP:
    return made()


@pytest.fixture(scope="module")
def files(model: ECLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "onnx"
    written = write_onnx(folder, model, Tokenizer.train(WORDS, 128), 12, decoder=True)
    assert all(0 < file.error < TOLERANCE / 10 for file in written), written
    return folder


def test_the_graphs_one_after_the_other_are_the_encoder(model: ECLIP, files: Path) -> None:
    """As an engine serves them: an image's embedding prompts its own tokens; 7 images, which no file was traced at."""
    from onnxruntime import InferenceSession

    encoder = Encoder(model, Tokenizer.train(WORDS, 128), max_tokens=12, trains_decoder=True)
    pixels = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    embedding, tokens = InferenceSession(files / "image.onnx").run(None, {"images": pixels.numpy()})
    feed = {"tokens": tokens, "prompt": embedding, "modality": np.full(7, IMAGE)}
    instance, shares = InferenceSession(files / "decoder.onnx").run(None, feed)
    images = encoder.images(pixels, [(32, 32)] * 7)
    wanted = encoder.instances(images, images.features.cls, IMAGE)
    for found, expected in ((embedding, images.vectors), (instance, wanted.vectors), (shares, wanted.maps)):
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_int8_files_are_close_on_every_cpu(tmp_path: Path) -> None:
    """AVX2's products of signed weights overflow; a CPU with VNNI would not show it in the cosine."""
    import onnx

    tokenizer = Tokenizer.train([*WORDS, *onnx_files._TEXTS], 128)
    written = write_onnx(tmp_path / "onnx", made(), tokenizer, 12, decoder=True, int8=True)
    assert [file.name for file in written[::2]] == ["image.onnx", "text.onnx", "decoder.onnx"]
    for exact, rounded in zip(written[::2], written[1::2], strict=True):
        assert rounded.name == exact.name.replace(".onnx", ".int8.onnx")
        assert exact.cosine is None and rounded.error > exact.error
        assert rounded.cosine is not None and 0.97 < rounded.cosine < 1
        graph = onnx.load(tmp_path / "onnx" / rounded.name).graph
        kinds = {each.data_type for each in graph.initializer if each.name.endswith("_quantized")}
        assert kinds == {onnx.TensorProto.UINT8}, rounded.name


def test_padding_changes_nothing(files: Path) -> None:
    from onnxruntime import InferenceSession

    session = InferenceSession(files / "text.onnx")
    ids, mask = np.array([[2, 9, 11, 3]]), np.ones((1, 4), np.int64)
    long = {"input_ids": np.pad(ids, ((0, 0), (0, 9))), "attention_mask": np.pad(mask, ((0, 0), (0, 9)))}
    short = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    np.testing.assert_allclose(session.run(None, long)[0], short, atol=1e-6)


def test_only_operators_that_every_engine_has(files: Path) -> None:
    import onnx

    for path in files.glob("*.onnx"):
        graph = onnx.load(path)
        assert {node.domain for node in graph.graph.node} == {""}
        assert [imported.version for imported in graph.opset_import] == [onnx_files.OPSET]


def test_a_file_that_differs_is_not_given_out(model: ECLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match=r"image.onnx: differs from PyTorch by .* 0 is the most; .*leave --onnx out"):
        write_onnx(tmp_path / "onnx", model, Tokenizer.train(WORDS, 128), 12, decoder=True)
    monkeypatch.setattr(onnx_files, "_MOST_BYTES", 10)
    with pytest.raises(ValueError, match="image.onnx: 0.0 GB of weights, an ONNX file holds 2"):
        write_onnx(tmp_path / "again", model, Tokenizer.train(WORDS, 128), 12, decoder=True)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf'--onnx needs the package {name}; pip install -e ".\[export\]"'):
        onnx_files.require_onnx()
