"""What happens before training: every check that can fail, the data, the tokenizer, the run folder."""

import dataclasses
import shutil
from dataclasses import dataclass
from typing import Any

from .checkpoint import list_checkpoints, newest_checkpoint, read_config
from .config import RunConfig
from .dataloading.demo import pack_demo
from .dataloading.shards import ShardIndex
from .dataloading.text import WordPiece
from .metrics import check_packages
from .parallel import Ranks
from .presets import PRESETS

PACKED_PRESETS = ("demo", "demo_towers", "debug")
"""Presets whose own data folder is filled from the embedded catalogue."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` checked and built."""

    config: RunConfig
    """With model.vocab_size set from the tokenizer."""
    index: ShardIndex
    tokenizer: WordPiece


def prepare(config: RunConfig, ranks: Ranks) -> Prepared:
    """Find what is missing or contradictory, pack the embedded catalogue, get the tokenizer, save config.json.

    Rank 0 writes, the others wait and read. Raises ValueError before training for missing files or packages, data that
    cannot be read, a batch that does not divide, a run folder in use, a resume under other settings.
    """
    config.check_files()
    check_packages(config)
    _check_batch(config, ranks)
    if ranks.is_main:
        _check_run_dir(config)
        _pack_embedded_catalogue(config)
    ranks.barrier()
    index = ShardIndex.open(config.data.data_dir, "train")
    if config.evaluate:
        try:
            ShardIndex.open(config.data.data_dir, "test")
        except ValueError as error:
            raise ValueError(f"{error}; or train with --no-evaluate") from error
    tokenizer_dir = config.run_dir / "tokenizer"
    if ranks.is_main and not (config.resume and tokenizer_dir.is_dir()):
        make_tokenizer(config, index).save(tokenizer_dir)
    ranks.barrier()
    tokenizer = WordPiece.load(tokenizer_dir)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    if ranks.is_main:
        _save_config(config)
    ranks.barrier()
    return Prepared(config=config, index=index, tokenizer=tokenizer)


def make_tokenizer(config: RunConfig, index: ShardIndex) -> WordPiece:
    """The given BERT vocabulary, or one of at most model.vocab_size pieces learnt from the catalogue's text."""
    if config.vocab_file is not None:
        return WordPiece.from_vocab_file(config.vocab_file)
    return WordPiece.train(index.texts(), config.model.vocab_size)


def _check_batch(config: RunConfig, ranks: Ranks) -> None:
    size, queries = config.global_batch_size, config.model.num_queries
    if size % ranks.world_size:
        raise ValueError(
            f"global_batch_size={size} does not divide over {ranks.world_size} ranks; "
            f"set --global-batch-size to a multiple of {ranks.world_size}"
        )
    if config.objective.objective == "eclip" and size < queries:
        raise ValueError(
            f"global_batch_size={size} cannot prompt {queries} queries with distinct products; "
            f"set --global-batch-size to at least {queries} or lower --num-queries"
        )


def _check_run_dir(config: RunConfig) -> None:
    """Refuse to mix two runs in one folder; empty it when told to."""
    run_dir = config.run_dir
    if config.resume:
        if newest_checkpoint(run_dir) is not None:
            _require_same(read_config(run_dir), config)
        return
    if list_checkpoints(run_dir) and not config.overwrite:
        raise ValueError(
            f"{run_dir} holds the checkpoints of an earlier run; continue it with --resume, replace it with "
            f"--overwrite, or choose another --run-dir"
        )
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    shutil.rmtree(run_dir / "tokenizer", ignore_errors=True)
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)


def _require_same(saved: RunConfig, config: RunConfig) -> None:
    """A resumed run keeps what its weights and its data order depend on."""
    old, new = dataclasses.asdict(saved), dataclasses.asdict(config)
    old["model"].pop("vocab_size")  # set from the tokenizer, which the run folder keeps
    new["model"].pop("vocab_size")
    for name in ("model", "seed", "global_batch_size"):
        if old[name] != new[name]:
            raise ValueError(
                f"--resume with another {name}: the run has {_difference(old[name], new[name])}, the flags give "
                f"{_difference(new[name], old[name])}; use the flags of the first start or another --run-dir"
            )


def _difference(one: Any, other: Any) -> Any:
    """What `one` has that `other` has not, for dicts; else `one`."""
    return {k: v for k, v in one.items() if v != other[k]} if isinstance(one, dict) else one


def _pack_embedded_catalogue(config: RunConfig) -> None:
    """Fill a demo preset's own data folder; `pack_demo` returns at once when it is up to date."""
    data = config.data
    if config.preset in PACKED_PRESETS and data.data_dir == PRESETS[config.preset].data.data_dir:
        pack_demo(
            data.data_dir,
            image_size=data.demo_image_size,
            images_per_product=data.demo_images_per_product,
            limit=data.demo_products,
        )


def _save_config(config: RunConfig) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    partial = config.run_dir / "config.json.partial"
    partial.write_text(config.to_json())
    partial.rename(config.run_dir / "config.json")
