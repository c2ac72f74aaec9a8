"""ONNX files of a model, compared with PyTorch by onnxruntime at several sizes before they are given out.

Written by PyTorch's tracer (`dynamo=False`; deprecated, and there in 2.11 to 2.13): for graphs of the debug preset it
takes 0.5 s where the exporter on torch.export, which gives the same numbers, takes 8 to 10 s (one busy core).
"""

import dataclasses
import importlib
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclip.dataloading.text import Tokenizer
from eclip.export.graphs import DecoderGraph, ImageGraph, TextGraph
from eclip.model.eclip import ECLIP
from eclip.model.instance_decoder import IMAGE, TEXT

OPSET = 18
TOLERANCE = 1e-4
BATCHES = (1, 2, 5)
"""At these sizes a file is compared; it is traced at the second."""
_TEXTS = (
    "sofa",
    "a red armchair of velvet with wooden legs, two cushions and a footstool, for the living room and the hall, 80 cm",
    "dining table, oak",
    "lamp, 12 W",
    "garden chairs, set of four",
)
_MOST_BYTES = 1_900_000_000  # a protobuf message holds 2 GiB

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A graph that was written and compared."""

    name: str
    size: int
    """Bytes."""
    error: float
    """The largest difference from PyTorch over all outputs and sizes; of outputs beyond 1, relative to the largest."""
    cosine: float | None = None
    """Of a file with int8 weights: the least cosine of its embeddings with PyTorch's."""

    def told(self) -> str:
        """How well it agrees, in words."""
        if self.cosine is not None:
            return f"int8 weights and activations: cosine with PyTorch {self.cosine:.4f} at least"
        return f"differs from PyTorch by {self.error:.1e} at most"


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """What is written, and what it is compared with."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple[str, ...]]
    """Names of the inputs, and of their first axes, which may have any size."""
    outputs: tuple[str, ...]
    samples: Sequence[Tensors]
    """Inputs of each size of BATCHES."""
    expected: Callable[[int], Tensors]
    """What the model gives for the sample of that number, by the way that `eclip.load` goes."""


def require_onnx() -> None:
    """Raise ValueError when a package is missing, before anything is computed."""
    for name in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise ValueError(f'--onnx needs the package {name}; pip install -e ".[export]"') from None


def write_onnx(
    folder: Path, model: ECLIP, tokenizer: Tokenizer, max_tokens: int, *, decoder: bool, int8: bool = False
) -> list[OnnxFile]:
    """Write image.onnx, text.onnx and (decoder) decoder.onnx into `folder`, each compared with `model`.

    int8: beside each one NAME.int8.onnx, for CPUs. model: in eval mode, on the CPU. Raises ValueError when a package is
    missing, a graph is too large for one file, or differs by more than TOLERANCE.
    """
    require_onnx()
    folder.mkdir(parents=True)
    # The same weights on plain PyTorch: our own operators are not ONNX's.
    plain = ECLIP(dataclasses.replace(model.config, kernels="reference"))
    plain.load_state_dict(model.state_dict())
    plain.eval()
    graphs = [_image(model, plain), _text(model, plain, tokenizer, max_tokens)]
    if decoder:
        graphs.append(_decoder(model, plain))
    written = []
    for graph in graphs:
        written.append(_write(folder, graph))
        if int8:
            written.append(_write_int8(folder, graph))
    return written


def _image(model: ECLIP, plain: ECLIP) -> _Graph:
    size = model.config.image_size
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=draw) for n in BATCHES]

    def expected(number: int) -> Tensors:
        found = model.encode_image(samples[number])
        return F.normalize(found.cls, dim=-1), found.tokens

    return _Graph(
        name="image",
        module=ImageGraph(plain),
        inputs={"images": ("batch",)},
        outputs=("embedding", "tokens"),
        samples=[(images,) for images in samples],
        expected=expected,
    )


def _text(model: ECLIP, plain: ECLIP, tokenizer: Tokenizer, max_tokens: int) -> _Graph:
    ragged = [tokenizer.encode(_TEXTS[:n], max_tokens) for n in BATCHES]
    axes = ("batch", "length")
    return _Graph(
        name="text",
        module=TextGraph(plain),
        inputs={"input_ids": axes, "attention_mask": axes},
        outputs=("embedding",),
        samples=[padded(tokens, bounds, tokenizer.pad_id) for tokens, bounds in ragged],
        expected=lambda number: (F.normalize(model.encode_text(*ragged[number]), dim=-1),),
    )


def padded(tokens: Tensor, cu_seqlens: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """A ragged batch as input_ids and attention_mask, both (n, L) int64."""
    lengths = cu_seqlens.diff()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, pad_id)
    ids[mask] = tokens
    return ids, mask.long()


def _decoder(model: ECLIP, plain: ECLIP) -> _Graph:
    config, draw = model.config, torch.Generator().manual_seed(0)
    samples = [
        (
            torch.randn(n, config.grid**2, config.embed_dim, generator=draw),
            torch.randn(n, config.embed_dim, generator=draw),
            torch.arange(n) % 2,
        )
        for n in BATCHES
    ]

    def expected(number: int) -> Tensors:
        tokens, prompts, modality = samples[number]
        by_kind = [model.decode_queries(tokens, model.instance_queries(prompts, kind), return_map=True)
                   for kind in (TEXT, IMAGE)]  # fmt: skip
        rows = [(by_kind[int(kind)], row) for row, kind in enumerate(modality)]
        slots = torch.stack([found.slots[row, 0] for found, row in rows])
        maps = torch.stack([found.assignment[row, 0] for found, row in rows if found.assignment is not None])
        return F.normalize(slots, dim=-1), maps

    return _Graph(
        name="decoder",
        module=DecoderGraph(plain),
        inputs={"tokens": ("batch",), "prompt": ("batch",), "modality": ("batch",)},
        outputs=("instance", "map"),
        samples=samples,
        expected=expected,
    )


@torch.no_grad()
def _write(folder: Path, graph: _Graph) -> OnnxFile:
    path = folder / f"{graph.name}.onnx"
    size = sum(tensor.numel() * tensor.element_size() for tensor in _used(graph.module))
    if size > _MOST_BYTES:
        raise ValueError(f"{path.name}: {size / 1e9:.1f} GB of weights, an ONNX file holds 2; leave --onnx out")
    axes = {name: dict(enumerate(names)) for name, names in graph.inputs.items()}
    axes |= {name: {0: "batch"} for name in graph.outputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that checks read, and of the tracer's age
        torch.onnx.export(
            graph.module.eval(),
            graph.samples[1],
            str(path),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    error, _ = _compare(path, graph)
    if not error <= TOLERANCE:
        raise ValueError(
            f"{path.name}: differs from PyTorch by {error:.1e} in onnxruntime, {TOLERANCE:g} is the most; nothing was "
            f"exported, leave --onnx out"
        )
    return OnnxFile(path.name, path.stat().st_size, error)


@torch.no_grad()
def _write_int8(folder: Path, graph: _Graph) -> OnnxFile:
    """onnxruntime's dynamic quantisation: weights by output channel in the file, activations when it runs.

    The weights' bytes are unsigned. Signed ones are right on CPUs with VNNI alone: AVX2 adds two of their products in
    16 bits, and where that overflows the embeddings are wrong (a cosine of 0.75 was seen).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / f"{graph.name}.int8.onnx"
    kinds = ["MatMul", "Gemm", "Gather"]  # not Conv: of patches it is a hundredth of the work
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises, by the root logger, to fold constants first, which export has done
    try:
        quantize_dynamic(
            folder / f"{graph.name}.onnx",
            path,
            per_channel=True,
            weight_type=QuantType.QUInt8,
            op_types_to_quantize=kinds,
        )
    finally:
        logging.disable(before)
    error, cosine = _compare(path, graph)
    return OnnxFile(path.name, path.stat().st_size, error, cosine)


def _used(module: Any) -> list[Tensor]:
    """The weights that a graph holds."""
    model = module.model
    parts = {
        ImageGraph: (model.image_encoder, model.image_projection),
        TextGraph: (model.text_encoder, model.text_projection),
        DecoderGraph: (model.queries, model.instance_decoder),
    }
    return [parameter for part in parts[type(module)] for parameter in part.parameters()]


def _compare(path: Path, graph: _Graph) -> tuple[float, float]:
    """The largest difference and the least cosine: see `OnnxFile`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences, cosines = [], []
    for number, sample in enumerate(graph.samples):
        feed = {name: tensor.numpy() for name, tensor in zip(graph.inputs, sample, strict=True)}
        found, wanted = session.run(None, feed), [tensor.numpy() for tensor in graph.expected(number)]
        for one, other in zip(found, wanted, strict=True):
            if one.shape != other.shape:
                raise ValueError(f"{path.name}: gives {one.shape} where PyTorch gives {other.shape}")
            differences.append(np.abs(one - other).max() / max(1.0, np.abs(other).max()))
        cosines.append((found[0] * wanted[0]).sum(-1).min())  # unit vectors
    return float(np.max(differences)), float(np.min(cosines))
