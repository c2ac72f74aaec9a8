"""Export a run: everything is checked, computed and compared before a folder is given out whole; then what is in it."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eclip import __version__
from eclip.config import RunConfig
from eclip.dataloading.text import Tokenizer
from eclip.evaluate.inputs import Catalogue, check_numbers
from eclip.export.card import CardFacts, write_card
from eclip.export.folder import CARD, ONNX, TOWERS, check_place, whole
from eclip.export.int8 import Loss, measure_loss
from eclip.export.onnx_files import OnnxFile, require_onnx, write_onnx
from eclip.export.towers import image_class, text_class, write_towers
from eclip.inference.loading import chosen_threshold
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.parallel.device import choose_device
from eclip.training.checkpoint import Weights, Which, load_run
from eclip.training.checkpoint.files import find_checkpoint
from eclip.training.checkpoint.run_folder import read_data_record
from eclip.weights.exported import CONFIG, TOKENIZER, WEIGHTS, Facts, is_exported, write_exported

_SPLITS = ("train", "val", "test")
_EVALUATED = {"split", "products", "images", "tables"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is exported, and how."""

    which: Which = "newest"
    weights: Weights = "model"
    name: str | None = None
    """Of the model, on the card; None: the run folder's."""
    licence: str | None = None
    towers: bool = True
    onnx: bool = False
    int8: bool = False
    measure: bool = True
    """With int8: what it costs, on the run's test split."""
    data_dir: Path | None = None
    limit: int | None = None
    batch_size: int = 64
    device: str = "auto"
    overwrite: bool = False
    progress: bool = True


def export_run(run_dir: Path, out: Path, wanted: Wanted) -> None:
    """Write the export of a run to `out` and print what is there.

    Raises ValueError, before anything is written, when there is no run, when `out` may not be written to, when a
    package is missing; and when a file of ONNX differs from PyTorch: nothing is left of the export then.
    """
    _check(run_dir, out, wanted)
    model, config, tokenizer = load_run(run_dir, which=wanted.which, weights=wanted.weights)
    evaluation = _evaluation(run_dir, wanted)
    facts = _facts(run_dir, config, wanted, evaluation)
    loss = _loss(run_dir, model, config, tokenizer, wanted)
    model = model.cpu()  # from where it was measured
    with whole(out) as folder:
        write_exported(folder, model, tokenizer, facts)
        if wanted.towers:
            write_towers(folder / TOWERS, model, tokenizer, facts.max_tokens)
        files: list[OnnxFile] = []
        if wanted.onnx:
            decoder, length = facts.trains_decoder, facts.max_tokens
            files = write_onnx(folder / ONNX, model, tokenizer, length, decoder=decoder, int8=wanted.int8)
        card = CardFacts(
            name=wanted.name or run_dir.resolve().name,
            facts=facts,
            config=config,
            parameters=_parameters(model),
            evaluation=evaluation,
            sizes=_sizes(run_dir, config, wanted),
            licence=wanted.licence,
            has_towers=wanted.towers,
            onnx=files,
            loss=loss,
        )
        (folder / CARD).write_text(write_card(card), encoding="utf-8")
        lines = _told(folder, out, card)
    print("\n".join(lines))


def _check(run_dir: Path, out: Path, wanted: Wanted) -> None:
    """Raise ValueError for what cannot be, before it costs anything."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such folder; give the --run-dir that training wrote")
    if is_exported(run_dir):
        raise ValueError(f"{run_dir}: an exported model already; give the --run-dir that training wrote")
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir}: no run here (config.json is missing); give the --run-dir that training wrote")
    if wanted.licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", wanted.licence):
        raise ValueError(f"--licence {wanted.licence}: give its SPDX name, such as apache-2.0, cc-by-4.0, other")
    if wanted.int8:
        check_numbers(wanted.batch_size, wanted.limit, "auto")
        choose_device(wanted.device)
    check_place(out, run_dir, overwrite=wanted.overwrite)
    if wanted.onnx:
        require_onnx()


def _facts(run_dir: Path, config: RunConfig, wanted: Wanted, evaluation: Mapping[str, Any] | None) -> Facts:
    found = find_checkpoint(run_dir, which=wanted.which)
    assert found is not None, "it was loaded"
    record = read_data_record(run_dir) or {}
    training = {
        "preset": config.preset,
        "checkpoint": wanted.which,
        "step": found.state["step"],
        "average": wanted.weights == "momentum",
        "catalogue": Path(record.get("data_dir") or config.data.data_dir).name,
        "fingerprints": record.get("fingerprints", {}),
        "torch": torch.__version__,
        "eclip": __version__,
    }
    return Facts(
        model=config.model,
        max_tokens=config.data.max_tokens,
        objective=config.objective.objective,
        trains_decoder=make_objective(config.objective).trains_decoder,
        threshold=chosen_threshold(evaluation),
        weights="int8" if wanted.int8 else "float32",
        training=training,
    )


def _loss(run_dir: Path, model: ECLIP, config: RunConfig, tokenizer: Tokenizer, wanted: Wanted) -> Loss | None:
    """Of int8, printed; None where it is not asked for or there is no catalogue to measure it on, which is said."""
    if not (wanted.int8 and wanted.measure):
        return None
    try:
        loss = measure_loss(
            run_dir,
            model,
            config,
            tokenizer,
            device=choose_device(wanted.device),
            data_dir=wanted.data_dir,
            batch_size=wanted.batch_size,
            limit=wanted.limit,
            progress=wanted.progress,
        )
    except ValueError as error:
        if wanted.data_dir is not None:
            raise
        print(f"what int8 costs is not measured: {error}")
        return None
    print("\n".join(loss.lines()))
    return loss


def _evaluation(run_dir: Path, wanted: Wanted) -> Mapping[str, Any] | None:
    """evaluation.json of this checkpoint and these weights, None where there is none that can be read."""
    told = [(wanted.which, "newest"), (wanted.weights, "model")]
    name = "evaluation" + "".join(f"-{value}" for value, usual in told if value != usual)
    with suppress(OSError, ValueError, AttributeError):
        record = json.loads((run_dir / f"{name}.json").read_text(encoding="utf-8"))
        tables = record["tables"].values() if record.keys() >= _EVALUATED else None
        if tables is not None and all(table.keys() >= {"title", "rows"} for table in tables):
            found: Mapping[str, Any] = record
            return found
    return None


def _sizes(run_dir: Path, config: RunConfig, wanted: Wanted) -> dict[str, tuple[int, int]]:
    """Products and images of the run's own splits, where they are still there."""
    sizes = {}
    with suppress(ValueError, OSError):
        catalogue = Catalogue.of_run(run_dir, config, None)
        for split in _SPLITS:
            with suppress(ValueError, OSError):
                index = catalogue.open(split)
                sizes[split] = (index.num_products, index.num_images)
    return sizes


def _parameters(model: ECLIP) -> dict[str, int]:
    parts = {
        "image tower": (model.image_encoder, model.image_projection),
        "text tower": (model.text_encoder, model.text_projection),
        "decoder": (model.queries, model.instance_decoder, model.matching_head),
    }
    return {
        name: sum(parameter.numel() for part in modules for parameter in part.parameters())
        for name, modules in parts.items()
    }


def _told(folder: Path, out: Path, card: CardFacts) -> list[str]:
    """What was written, how large it is, how well ONNX agrees."""

    def size(name: str) -> str:
        files = [folder / name] if (folder / name).is_file() else [p for p in (folder / name).rglob("*") if p.is_file()]
        return f"{sum(path.stat().st_size for path in files) / 1e6:8.1f} MB  {name}"

    model = card.facts.model
    lines = [
        f"written: {out}",
        f"{size(WEIGHTS)}: {sum(card.parameters.values()):,} parameters, {card.facts.weights}",
        f"{size(TOKENIZER)}, {CONFIG}, {CARD}",
    ]
    if card.has_towers:
        lines.append(f"{size(TOWERS)}: {image_class(model)} and {text_class(model)} of transformers, float32")
    lines += [f"{size(f'{ONNX}/{f.name}')}: {f.told()}" for f in card.onnx]
    if card.evaluation is None:
        lines.append("the card has no numbers: this checkpoint was not evaluated (eclip evaluate, then export again)")
    if card.licence is None:
        lines.append("the card states no licence; --licence NAME does")
    return lines
