"""A whole trained model as a folder: the format that `eclip export` writes, `eclip.load` and `--start-from` read.

    config.json          {"format": "eclip-model", "version": 1, "model": settings, "max_tokens", "objective",
                         "trains_decoder", "threshold", "weights": "float32" or "int8", "tokenizer": facts,
                         "library": version, "training": facts for readers, "files": {name: {"bytes", "sha256"}}}
    model.safetensors    every parameter by its own name, float32; of int8 weights the matrices of linear layers and
                         embeddings are int8, and beside each stands NAME.int8_scale (rows,) float32: row times scale
    tokenizer.json       as the `tokenizers` library has it

What else stands in the folder (the card, towers/, onnx/) is not read here. No path of the machine is in it, and no
checkpoint machinery is needed to open it: one process, safetensors and tokenizers.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eclip import __version__
from eclip.dataloading.file_kinds import HEAD, file_kind
from eclip.dataloading.text import Tokenizer
from eclip.files import sha256
from eclip.model.eclip import ECLIP
from eclip.model.settings import ModelConfig
from eclip.setting_rules import from_record, require

FORMAT, VERSION = "eclip-model", 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_SCALE = ".int8_scale"
_LARGEST = 127  # symmetric: -128 is left out
_COPY = "copy or download the exported folder again"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an exported model beside its weights."""

    model: ModelConfig
    """`kernels` is the machine's, not the model's: always "auto" here."""
    max_tokens: int
    """Texts are cut to so many pieces."""
    objective: str
    """What it was trained with; for readers."""
    trains_decoder: bool
    """Whether its instance decoder learnt anything."""
    threshold: float | None = None
    """Cuts score maps into regions, in [0, 1); None where no evaluation chose one."""
    weights: str = "float32"
    """How they are stored: float32 or int8."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """For readers: steps, catalogue, ..."""

    def __post_init__(self) -> None:
        longest: Any = self.max_tokens  # Any: out of JSON
        cut: Any = self.threshold
        require(isinstance(longest, int) and longest >= 3, f"max_tokens={longest!r}: a whole number, 3 or more")
        require(cut is None or (isinstance(cut, float) and 0 <= cut < 1), f"threshold={cut!r}: 0 <= threshold < 1")
        require(isinstance(self.trains_decoder, bool), f"trains_decoder={self.trains_decoder!r}: use true or false")
        require(self.weights in ("float32", "int8"), f"weights={self.weights!r}: use float32 or int8")


def write_exported(folder: Path, model: ECLIP, tokenizer: Tokenizer, facts: Facts) -> None:
    """Write the three files into `folder`, which is there. `facts.weights` says how weights are stored.

    Raises OSError, or safetensors' own error, when something cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if facts.weights == "int8":
        tensors = quantised(model, tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save(folder)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
             for name in (WEIGHTS, TOKENIZER)}  # fmt: skip
    settings = dataclasses.asdict(facts.model)
    del settings["kernels"]
    record = {
        "format": FORMAT,
        "version": VERSION,
        **{f.name: getattr(facts, f.name) for f in dataclasses.fields(facts)},
        "model": settings,
        "tokenizer": _tokenizer_facts(folder),
        "library": f"eclip {__version__}",
        "files": files,
    }
    (folder / CONFIG).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in (WEIGHTS, TOKENIZER, CONFIG):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _tokenizer_facts(folder: Path) -> dict[str, Any]:
    """For readers of config.json; the file itself says all."""
    told = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    reading = told["normalizer"] or {}
    lowercase = {"lowercase": reading["lowercase"]} if reading.get("type") == "BertNormalizer" else {}
    return {"kind": told["model"]["type"], **lowercase}


def quantised(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of linear layers and embeddings int8 rows and their scales, everything else as it is.

    Symmetric, a scale for each row: an output channel of a linear layer, a piece or position of an embedding.
    """
    matrices = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Embedding)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in matrices:
            found[name] = tensor
            continue
        scale = tensor.abs().amax(dim=1) / _LARGEST
        # A row of zeros stays one.
        rows = tensor / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
        found[name], found[name + _SCALE] = rows.round().to(torch.int8), scale
    return found


def dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 again: the inverse of `quantised`, up to half a scale."""
    scales = {name.removesuffix(_SCALE): tensor for name, tensor in tensors.items() if name.endswith(_SCALE)}
    return {
        name: tensor * scales[name][:, None] if name in scales else tensor
        for name, tensor in tensors.items()
        if not name.endswith(_SCALE)
    }


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported model, whole or not, or wants to be one: no run has weights at that place."""
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        record = None
    return (folder / WEIGHTS).exists() or (isinstance(record, dict) and record.get("format") == FORMAT)


def read_facts(folder: Path) -> Facts:
    """What config.json says. Raises ValueError, one line, for one that is missing, damaged, foreign or newer."""
    return _facts(folder, _record(folder))


def read_exported(folder: Path, device: torch.device | str = "cpu") -> tuple[ECLIP, Facts, Tokenizer]:
    """The model in eval mode on `device`, what is known of it, its tokenizer.

    Raises ValueError, one line, when a file is missing, is not the one that was written, or does not fit the settings.
    """
    record = _record(folder)
    facts = _facts(folder, record)
    tokenizer = _tokenizer(folder, record, facts)
    _require_written(folder, WEIGHTS, record)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own SafetensorError, which derives from Exception alone
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); {_COPY}") from error
    model = ECLIP(facts.model)
    _fill(model, dequantised(tensors), path)
    return model.to(device).eval(), facts, tokenizer


def _tokenizer(folder: Path, record: Mapping[str, Any], facts: Facts) -> Tokenizer:
    _require_written(folder, TOKENIZER, record)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > facts.model.vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER}: {tokenizer.vocab_size} pieces, the model has {facts.model.vocab_size}; {_COPY}"
        )
    return tokenizer


def _record(folder: Path) -> dict[str, Any]:
    """config.json of this format and version."""
    path = folder / CONFIG
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, an exported folder has one; {_COPY}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); {_COPY}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        kind = record.get("model_type") if isinstance(record, dict) else None
        whose = f"a model of transformers ({kind})" if isinstance(kind, str) else "another program's"
        raise ValueError(
            f"{path}: {whose}, not one that eclip export wrote; give a run's folder or an exported one (another "
            f"model's towers go into training: --image-weights, --text-weights)"
        )
    version = record.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{path}: version {version!r} of the format; {_COPY}")
    if version > VERSION:
        raise ValueError(
            f"{path}: version {version} of the format, written by {record.get('library')}; eclip {__version__} reads "
            f"versions up to {VERSION}: install a newer one"
        )
    return record


def _facts(folder: Path, record: Mapping[str, Any]) -> Facts:
    names = [f.name for f in dataclasses.fields(Facts)]
    try:
        found: Facts = from_record(Facts, {name: record[name] for name in names if name in record})
        return found
    except (ValueError, TypeError) as error:  # TypeError: a field without a default is not there
        raise ValueError(f"{folder / CONFIG}: {error}; {_COPY}") from None


def _require_written(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Raise ValueError unless a file has the size and the digest that config.json names."""
    path, files = folder / name, record.get("files")
    told = files.get(name) if isinstance(files, dict) else None
    if not isinstance(told, dict):
        raise ValueError(f"{folder / CONFIG}: does not say how long {name} is; {_COPY}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
        if size != told.get("bytes"):
            kind = file_kind(head)
            what = f"it is {kind}" if kind else f"{size} bytes, {told.get('bytes')} were written: a copy stopped"
            raise ValueError(f"{path}: {what}; {_COPY}")
        if sha256(path) != told.get("sha256"):
            raise ValueError(f"{path}: damaged, not what was written (SHA-256 differs); {_COPY}")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); {_COPY}") from None


def _fill(model: ECLIP, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load them all. Raises ValueError naming what is missing, left over, of another shape, NaN or infinite."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            what = "not in it" if name in wanted else "in it, and in no model of these settings"
            raise ValueError(f"{path}: {name} is {what}; {_COPY}")
        if tensors[name].shape != wanted[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, the settings ask for "
                f"{tuple(wanted[name].shape)}; {_COPY}"
            )
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity; export another checkpoint")
    model.load_state_dict(dict(tensors))
