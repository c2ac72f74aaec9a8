"""What int8 weights cost: product retrieval on the run's own test split, with the weights as they are and as stored."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from eclip.config import RunConfig
from eclip.dataloading.text import Tokenizer
from eclip.evaluate.evaluator import Evaluator
from eclip.evaluate.inputs import Catalogue
from eclip.evaluate.report.tables import Table
from eclip.evaluate.tasks.product_retrieval import product_retrieval
from eclip.model.eclip import ECLIP
from eclip.weights.exported import dequantised, quantised

METRICS = ("mAP@1", "mAP@10")
_SPLIT = "test"


@dataclass(frozen=True)
class Loss:
    """The same table twice."""

    counts: dict[str, int]
    """Queries and gallery."""
    rows: dict[str, dict[str, tuple[float, float]]]
    """By embedding and metric: with float32 and with int8 weights, in [0, 1]."""

    def lines(self) -> list[str]:
        """For the terminal, in %."""
        counts = ", ".join(f"{value} {name}" for name, value in self.counts.items())
        width = max(map(len, self.rows))
        lines = [f"int8 weights, {_SPLIT} split, the same product ({counts}), %: float32 -> int8"]
        for name, row in self.rows.items():
            cells = (f"{key} {100 * a:.1f} -> {100 * b:.1f} ({100 * (b - a):+.1f})" for key, (a, b) in row.items())
            lines.append(f"  {name:<{width}}  {'   '.join(cells)}")
        return lines


def as_int8(model: ECLIP) -> ECLIP:
    """The model that an export with int8 weights loads as, on the model's device."""
    stored = ECLIP(model.config)
    stored.load_state_dict(dequantised(quantised(model, model.state_dict())))
    return stored.to(model.logit_scale.device).eval()


def measure_loss(
    run_dir: Path,
    model: ECLIP,
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    data_dir: Path | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    progress: bool = True,
) -> Loss:
    """Product retrieval with both weights. data_dir, limit: as of an evaluation.

    Raises ValueError when there is no such catalogue, or nothing to retrieve in it.
    """
    catalogue = Catalogue.of_run(run_dir, config, data_dir)
    index = catalogue.open(_SPLIT)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=catalogue.folder))
    tables = []
    for each in (model, as_int8(model)):
        evaluator = Evaluator(
            model=each.to(device),
            config=config,
            tokenizer=tokenizer,
            catalogue=catalogue,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
        features = evaluator.split(_SPLIT, index, limit).features
        table = product_retrieval(features, features.products, title="")
        if not isinstance(table, Table):
            raise ValueError(f"{catalogue.folder}: {table}")
        tables.append(table)
    exact, rounded = tables
    rows = {
        name: {metric: (row[metric], rounded.rows[name][metric]) for metric in METRICS}
        for name, row in exact.rows.items()
        if name != "chance"
    }
    return Loss(exact.counts, rows)
