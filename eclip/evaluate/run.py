"""Evaluate one run on one split: open run and catalogue, features once, task after task, then a JSON, tables, a sheet.

What is measured and how is the tasks' business: a new one is a file in tasks/ and a line in TASKS.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.inputs import Catalogue, check_numbers, choose_device
from eclip.evaluate.report.lettering import WAY_OUT
from eclip.evaluate.report.sheet import Overlay, draw_sheet
from eclip.evaluate.report.tables import Table, format_table
from eclip.evaluate.tasks import (
    classification,
    grounding,
    image_text_loss,
    image_text_retrieval,
    product_retrieval,
    reranking,
    words_and_photo,
)
from eclip.files import replace_text, writing
from eclip.objectives.objective import make_objective
from eclip.parallel.ranks import ALONE, Ranks
from eclip.training.checkpoint import Weights, Which, load_run
from eclip.training.feature_cache.cache import cache_folder

Task = Callable[[Evaluator, Split], Iterator[tuple[str, Outcome]]]
"""Yields a name and what stands under it; one task may have several tables."""

TASKS: tuple[Task, ...] = (
    classification.run,
    image_text_retrieval.run,
    image_text_loss.run,
    product_retrieval.run,
    words_and_photo.run,
    reranking.run,
    grounding.run,
)
"""In the order of the tables."""


@dataclass
class Answers:
    """What all tasks said."""

    tables: dict[str, Table] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a table is not there."""
    overlays: list[Overlay] = field(default_factory=list)


def evaluate_run(
    run_dir: Path,
    device: torch.device | str = "cpu",
    *,
    data_dir: Path | None = None,
    split: str = "test",
    batch_size: int = 64,
    limit: int | None = None,
    threshold: float | Literal["auto"] = "auto",
    cache_dir: Path | None = None,
    decode_queries: int = 0,
    progress: bool = True,
    which: Which = "newest",
    weights: Weights = "model",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Evaluate a checkpoint of `run_dir` on a split; print the tables.

    which, weights: the newest checkpoint or the best, the trained weights or their moving average (`load_run`).
    data_dir: the catalogue, where it is not the one at the place that the run recorded (see inputs.py). limit: take
    only so many products, evenly spread. threshold: cuts the score maps into regions; "auto" takes the
    best of a small grid on the VAL split. cache_dir: see Evaluator; a run trained with --cache-features has one anyway.
    decode_queries: for so many queries, also rerank with candidates decoded one by one (tasks/reranking.py).
    ranks: this is rank 0 of several that help (together.py).
    Writes RUN/evaluation.json and, where boxes are known, RUN/grounding.png; whatever is not the usual has its own
    files (evaluation-val.json, evaluation-best-momentum.json). Returns what the JSON holds:
    result["tables"][task]["rows"][row][metric], in [0, 1] unless the table's unit is nats, None where undefined.
    Raises ValueError when there is no run, when its data is missing or other than it was, when features are not finite,
    and, after the tables are printed, when the files cannot be written.
    """
    run_dir = Path(run_dir)
    check_numbers(batch_size, limit, threshold, decode_queries)
    device = choose_device(device)
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir}: no run here (config.json is missing); give the --run-dir that training wrote")
    began = time.monotonic()
    model, config, tokenizer = load_run(run_dir, device, which=which, weights=weights)
    catalogue = Catalogue.of_run(run_dir, config, data_dir)
    config = replace(config, data=replace(config.data, data_dir=catalogue.folder))
    index = catalogue.open(split)
    evaluator = Evaluator(
        model=model,
        config=config,
        tokenizer=tokenizer,
        catalogue=catalogue,
        device=device,
        batch_size=batch_size,
        threshold=threshold,
        cache_dir=cache_folder(config) if cache_dir is None and config.cache_features else cache_dir,
        cache_is_wanted=cache_dir is not None,
        decode_queries=decode_queries,
        progress=progress,
        ranks=ranks,
    )
    given = evaluator.split(split, index, limit)
    answers = run_tasks(evaluator, given)
    result = {
        "run_dir": str(run_dir),
        "split": split,
        "checkpoint": which,
        "weights": weights,
        "data": {"data_dir": str(catalogue.folder), "fingerprint": index.fingerprint, "notes": catalogue.notes},
        "products": len(given.facts),
        "images": len(given.features),
        "corrupt": given.corrupt,
        "decoder_trained": make_objective(config.objective).trains_decoder,
        "seconds": round(time.monotonic() - began, 1),
        "tables": {name: table.to_dict() for name, table in answers.tables.items()},
        "skipped": answers.skipped,
    }
    _report(run_dir, result, answers)
    return result


def run_tasks(evaluator: Evaluator, split: Split) -> Answers:
    """Every task, one after the other."""
    answers = Answers()
    for task in TASKS:
        for name, outcome in task(evaluator, split):
            if isinstance(outcome, Table):
                answers.tables[name] = outcome
            elif isinstance(outcome, str):
                answers.skipped[name] = outcome
            else:
                answers.overlays += outcome
    return answers


def _report(run_dir: Path, result: dict[str, Any], answers: Answers) -> None:
    """Print the tables, then write the JSON and the sheet: in this order, so that a full disk costs no numbers."""
    told = [(result["split"], "test"), (result["checkpoint"], "newest"), (result["weights"], "model")]
    suffix = "".join(f"-{value}" for value, usual in told if value != usual)
    path, sheet = run_dir / f"evaluation{suffix}.json", run_dir / f"grounding{suffix}.png"
    try:
        _print_tables(result, answers)
    finally:  # also when nobody reads what is printed (`| head`)
        replace_text(path, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if answers.overlays and (note := draw_sheet(answers.overlays, sheet)):
        print(f"\n{sheet}: {note}; {WAY_OUT}")
    if not answers.overlays and sheet.exists():
        with writing(sheet):
            sheet.unlink()  # of an earlier evaluation: beside these numbers it would be taken for theirs
    print(f"\nwritten: {path}" + (f", {sheet}" if answers.overlays else ""))


def _print_tables(result: dict[str, Any], answers: Answers) -> None:
    size = f"{result['products']} products, {result['images']} images"
    what = "" if result["checkpoint"] == "newest" else f"{result['checkpoint']} checkpoint, "
    what += "" if result["weights"] == "model" else f"{result['weights']} weights, "
    print(f"\n{result['run_dir']}: {what}{result['split']} split, {size}; numbers in %, losses in nats\n")
    for note in result["data"]["notes"]:
        print(f"note: {note}\n")
    if not result["decoder_trained"]:
        print("instance rows: absent, this run trained no instance decoder\n")
    print("\n\n".join(format_table(table) for table in answers.tables.values()))
    for name, reason in answers.skipped.items():
        print(f"\nskipped {name}: {reason}")
