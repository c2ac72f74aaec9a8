"""Under torchrun: five steps in float64 for K = 1, 2, 3 parts a rank, against one process with the whole batch."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from eclip.config import RunConfig
from eclip.parallel.ranks import Ranks, find_ranks, part, start_ranks
from eclip.train import train
from eclip.training.checkpoint import load_run
from tests.training.run_folders import ALONE, make_config, metrics_lines

TERMS = ("loss", "itc", "inter", "itm", "intra", "entropy", "grad_norm", "logit_scale")


def _config(data_dir: Path, run_dir: Path, micro_batch: int | None, shard: str = "full") -> RunConfig:
    config = make_config(
        data_dir, run_dir, steps=5, checkpoint_every=5, log_every=1, decoder_depth=2,
        own_image_share=0.3, gaussian_share=0.3, token_keep=0.7, shard=shard,
    )  # fmt: skip
    return dataclasses.replace(config, global_batch_size=12, micro_batch=micro_batch, max_nonfinite_steps=0)


def _outcome(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return load_run(run_dir)[0].state_dict(), metrics_lines(run_dir)


def main() -> None:
    torch.set_default_dtype(torch.float64)  # of parameters, draws and losses
    data_dir, folder, shard = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    watch = find_ranks(timeout=120)
    ranks: Ranks = start_ranks(watch)
    if ranks.is_main:
        train(_config(data_dir, folder / "alone", None), ALONE)
    ranks.barrier()
    rows = 12 // ranks.world_size
    parts = [1, 2, 3]
    for count in parts:
        train(_config(data_dir, folder / f"parts{count}", rows // count if count > 1 else None, shard), ranks)
    if ranks.is_main:
        weights, lines = _outcome(folder / "alone")
        report: dict[str, list[float]] = {"parts": [*parts], "weights": [], "losses": []}
        for count in parts:
            others, found = _outcome(folder / f"parts{count}")
            report["weights"].append(max(float((others[n] - w).abs().max()) for n, w in weights.items()))
            report["losses"].append(max(abs(a[n] - b[n]) for a, b in zip(lines, found, strict=True) for n in TERMS))
        (folder / "differences.json").write_text(json.dumps(report))
    part(ranks)


if __name__ == "__main__":
    main()
