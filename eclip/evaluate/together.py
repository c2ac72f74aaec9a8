"""The evaluation at the end of a run on several ranks: rank 0 evaluates, and all of them encode the images.

Whenever rank 0 wants features of some rows, every rank takes every world_size-th batch of them, with the checkpoint's
model on its own device; locked towers' outputs are cached by all together as in training. Rankings, tables and pictures
are rank 0's alone. A batch is the same whoever encodes it, so that the numbers are those of one process.
"""

import gc
from dataclasses import replace
from pathlib import Path

from eclip.evaluate.evaluator import Evaluator, Wanted
from eclip.evaluate.inputs import Catalogue
from eclip.parallel.ranks import Ranks
from eclip.training.checkpoint import load_run
from eclip.training.feature_cache.cache import cache_folder


def evaluate_together(run_dir: Path, ranks: Ranks) -> None:
    """`evaluate_run` of the newest checkpoint on the test split; every rank must call it, and none holds a model.

    Raises what that raises, on rank 0; the others PeerFailed, or what the end of a connection raises.
    """
    gc.collect()  # what is left of training
    if not ranks.is_main:
        _help(run_dir, ranks)
        return
    from eclip.evaluate import run

    run.evaluate_run(run_dir, ranks.device, ranks=ranks)
    ranks.from_main(lambda: None)


def _help(run_dir: Path, ranks: Ranks) -> None:
    """Encode what rank 0 wants until it wants nothing more."""
    evaluator: Evaluator | None = None
    while (wanted := ranks.from_main(_of_rank_0)) is not None:
        evaluator = evaluator or _open(run_dir, ranks)
        evaluator.help(wanted)


def _of_rank_0() -> Wanted | None:
    raise AssertionError("called on rank 0 only")


def _open(run_dir: Path, ranks: Ranks) -> Evaluator:
    model, config, tokenizer = load_run(run_dir, ranks.device)
    catalogue = Catalogue.of_run(run_dir, config, None)
    config = replace(config, data=replace(config.data, data_dir=catalogue.folder))
    return Evaluator(
        model=model,
        config=config,
        tokenizer=tokenizer,
        catalogue=catalogue,
        device=ranks.device,
        cache_dir=cache_folder(config) if config.cache_features else None,
        progress=False,
        ranks=ranks,
    )
