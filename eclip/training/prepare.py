"""What happens before training: every check that can fail, the data, the tokenizer, and last the run folder.

`prepare` reads and checks, and takes the run folder for itself; the trainer is built and, on --resume, the checkpoint
loaded; only then `Prepared.commit` writes to the folder. A start that is refused anywhere leaves it as it was.
"""

import dataclasses
import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eclip.config import RunConfig
from eclip.dataloading.demo import pack_demo
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from eclip.files import writing
from eclip.parallel.ranks import Ranks
from eclip.parallel.torchrun import begun_by_this_launch, mark_begun
from eclip.presets import DISPOSABLE_RUNS, PRESETS
from eclip.training.checkpoint.files import STATE, Found, find_checkpoint, list_checkpoints, set_aside
from eclip.training.checkpoint.resume_rules import describe_changes, require_same_batches, require_same_run
from eclip.training.checkpoint.run_folder import (
    check_usable,
    install,
    own,
    read_config,
    read_data_record,
    read_tokenizer,
    refuse_busy,
)
from eclip.training.metrics.sinks import check_packages
from eclip.training.optim import check_locks, check_optimizer, describe_switch
from eclip.training.starting.batches import as_begun, check_batches, resolve_sizes
from eclip.training.starting.estimate import check_resources
from eclip.training.starting.start_from import Start, open_start
from eclip.training.validation import open_val

PACKED_PRESETS = ("demo", "demo_towers", "debug")
"""Presets whose own data folder is filled from the embedded catalogue."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` checked and built."""

    config: RunConfig
    """With model.vocab_size set from the tokenizer and data.data_dir absolute."""
    index: ShardIndex
    tokenizer: Tokenizer
    checkpoint: Found | None = None
    """Where --resume continues."""
    notes: tuple[str, ...] = ()
    """Lines to print."""
    data_record: dict[str, Any] = field(default_factory=dict)
    """data.json: the folder, and the fingerprint of each split that is there."""

    def commit(self, ranks: Ranks) -> None:
        """Write config.json, data.json and the tokenizer; a new run replaces an earlier one's files. All ranks call it.

        Raises CannotWrite.
        """
        ranks.from_main(self._write)

    def _write(self) -> None:
        run_dir, resumed = self.config.run_dir, self.checkpoint is not None
        tokenizer = None if resumed else self.tokenizer
        install(run_dir, self.config, self.data_record, tokenizer, replace=not resumed)
        if self.checkpoint is not None:
            with writing(run_dir):
                set_aside(self.checkpoint.damaged)
        mark_begun(run_dir)


def prepare(config: RunConfig, ranks: Ranks, hold: ExitStack) -> Prepared:
    """Find what is missing or contradictory, pack the embedded catalogue, get the tokenizer, own the run folder.

    hold: its exit lets another run have the folder, in which nothing but the lock is written here. Raises ValueError
    for missing files or packages, data that cannot be read, a batch that does not divide, a run folder in use or of
    another program, a resume under other settings, of a damaged run or with nothing left to do.
    """
    check_packages(config)
    check_optimizer(config)
    check_locks(config)
    if not config.fit_batch:
        check_batches(config, ranks)
    # A restart by torchrun has the flags of the first start, which may have been a new run.
    resume = ranks.from_main(lambda: config.resume or begun_by_this_launch(config.run_dir))
    return _prepare(dataclasses.replace(config, resume=resume), ranks, hold)


def _prepare(config: RunConfig, ranks: Ranks, hold: ExitStack) -> Prepared:
    saved = ranks.from_main(lambda: _check_run_dir(config))
    resumed = saved is not None
    config.check_files(resumed=resumed)
    start = None
    if config.start_from is not None and not resumed:
        start = ranks.from_main(lambda: open_start(config))
    ranks.from_main(lambda: _pack_embedded_catalogue(config))
    config = _absolute(config)
    index = ShardIndex.open(config.data.data_dir, "train")
    config, sizes = resolve_sizes(config, index.num_products, ranks.world_size)
    if config.fit_batch:  # any other size was checked before the catalogue was opened
        check_batches(config, ranks)
    if config.validate_every:
        ranks.from_main(lambda: open_val(config))
    record, notes = ranks.from_main(lambda: _data_record(config, index))
    notes = sizes + notes + _batch_notes(config, index.num_products)
    checkpoint = None
    if saved is not None:
        record, changed = ranks.from_main(lambda: _check_same_data(config.run_dir, record))
        notes += changed
        checkpoint = _checkpoint_to_continue(config.run_dir, ranks)
        saved = _absolute(saved)
        _require_steps(config, checkpoint)
        require_same_batches(saved, config, checkpoint.state["step"])
        if checkpoint.state["step"] == config.steps:
            notes += (f"all {config.steps} steps are done",)
            config = _as_trained(saved, config)
        said = (describe_changes(saved, config), describe_switch(saved.optim, config.optim))
        notes += tuple(note for note in said if note is not None)
    tokenizer = ranks.from_main(lambda: _tokenizer(config, index, checkpoint, start))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    notes += check_resources(config, index, tokenizer, ranks)
    ranks.from_main(lambda: _take_folder(config, checkpoint, hold))
    return Prepared(
        config=config, index=index, tokenizer=tokenizer, checkpoint=checkpoint, notes=notes, data_record=record
    )


def make_tokenizer(config: RunConfig, index: ShardIndex) -> Tokenizer:
    """The given vocabulary, or one of at most model.vocab_size pieces learnt from the catalogue's text."""
    if config.vocab_file is not None:
        padded = config.model.text_architecture == "siglip"
        return Tokenizer.from_vocab_file(config.vocab_file, cased=config.cased, padded=padded)
    return Tokenizer.train(index.texts(), config.model.vocab_size)


def _check_run_dir(config: RunConfig) -> RunConfig | None:
    """Refuse to mix two runs in one folder; the settings of the run that --resume continues. Changes nothing."""
    run_dir = config.run_dir
    check_usable(run_dir)
    refuse_busy(run_dir)
    if config.resume:
        if not list_checkpoints(run_dir):
            return None
        saved = read_config(run_dir)
        require_same_run(saved, as_begun(saved, config))
        return saved
    if list_checkpoints(run_dir) and not _replaces(config):
        raise ValueError(
            f"{run_dir} holds the checkpoints of an earlier run; continue it with --resume, replace it with "
            f"--overwrite, or choose another --run-dir"
        )
    return None


def _batch_notes(config: RunConfig, products: int) -> tuple[str, ...]:
    """Lines on batches with a product twice, and on sizes of a schedule that no step has."""
    given = config.batch_schedule
    notes: tuple[str, ...] = ()
    name, flag = ("global_batch_size", "--global-batch-size") if given is None else ("batch", "--batch-schedule")
    size = config.schedule.until(config.steps).largest
    if size > products:
        notes += (
            f"{name}={size} of {products} products: a product meets itself in every step, as if it were another one; "
            f"{flag} with {products} or less avoids that",
        )
    later = next((first for first, _ in config.schedule.entries if first >= max(1, config.steps)), None)
    if later is not None:
        notes += (f"--batch-schedule {given}: the run ends after {config.steps} steps, before it is at step {later}",)
    return notes


def single_image_note(index: ShardIndex, config: RunConfig) -> str | None:
    """A line on products with one image only, whose two views show that one image; None where there is none."""
    count = int((np.diff(index.image_start) == 1).sum())
    if not count:
        return None
    note = f"{count} of {index.num_products} products have one image only: "
    if not config.cache_features:
        return note + "two crops of it make their pair"
    if config.cached_views == 1:
        return note + "with --cached-views 1 both sides of their pair are the same to the bit; with more they differ"
    return note + f"two of the {config.cached_views} cached views of it make their pair"


def _take_folder(config: RunConfig, checkpoint: Found | None, hold: ExitStack) -> None:
    """Own the run folder, and find in it what was checked: another run may have had it since."""
    hold.enter_context(own(config.run_dir))
    found = list_checkpoints(config.run_dir)
    checked = [] if checkpoint is None else [checkpoint.path, *reversed(checkpoint.damaged)]
    newest = found[-len(checked) :] if checked else found
    if newest != checked and not _replaces(config):
        raise ValueError(f"{config.run_dir}: another run wrote checkpoints there meanwhile; start again")


def _replaces(config: RunConfig) -> bool:
    """Whether a start may delete an earlier run."""
    disposable = config.run_dir.resolve() in [folder.resolve() for folder in DISPOSABLE_RUNS]
    return not config.resume and (config.overwrite or disposable)


def _absolute(config: RunConfig) -> RunConfig:
    """config.json is read from other folders than the one that training was started in."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=config.data.data_dir.resolve()))


def _data_record(config: RunConfig, index: ShardIndex) -> tuple[dict[str, Any], tuple[str, ...]]:
    """data.json, and notes on splits that are there and cannot be read.

    --evaluate needs the test split, and val, from which it takes its thresholds, whole or not at all.
    """
    fingerprints, notes = {"train": index.fingerprint}, []
    for split in ("val", "test"):
        try:
            fingerprints[split] = ShardIndex.open(config.data.data_dir, split).fingerprint
        except ValueError as error:
            there = any(config.data.data_dir.glob(f"{split}-*.tar"))
            if config.evaluate and (split == "test" or there):
                raise ValueError(f"{error}; or train with --no-evaluate") from error
            if there:
                notes.append(f"the {split} split is not recorded: {error}")
    return {"data_dir": str(config.data.data_dir), "fingerprints": fingerprints}, tuple(notes)


def _check_same_data(run_dir: Path, record: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The run's data.json, completed by `record`, and notes on other splits that changed since it began.

    Raises ValueError for another catalogue.
    """
    begun = read_data_record(run_dir)
    if begun is None:  # the loader's state in the checkpoint knows the train split too
        return record, ()
    old, new = begun["fingerprints"], record["fingerprints"]
    if old.get("train") != new["train"]:
        raise ValueError(
            f"{record['data_dir']}: its train split is not the one that {run_dir} began with (fingerprint "
            f"{new['train']}, the run's is {old.get('train')}, of {begun.get('data_dir')}); give its --data-dir, or "
            f"another --run-dir"
        )
    notes = tuple(
        f"the {split} split is not the one that the run began with (fingerprint {old[split]} -> {new[split]})"
        for split in ("val", "test")
        if split in old and split in new and old[split] != new[split]
    )
    return {"data_dir": record["data_dir"], "fingerprints": {**new, **old}}, notes


def _checkpoint_to_continue(run_dir: Path, ranks: Ranks) -> Found:
    """The newest whole one of a run that has some. Raises ValueError when none is whole or the state is cut down."""
    checkpoint = find_checkpoint(run_dir, ranks)
    assert checkpoint is not None
    if "loader" not in checkpoint.state:  # an older version's, cut down by hand: this one's has a digest
        raise ValueError(
            f"{checkpoint.path / STATE}: does not say where the data stood; restore it from a copy, or remove the "
            f"folder to take the checkpoint before"
        )
    return checkpoint


def _require_steps(config: RunConfig, checkpoint: Found) -> None:
    done, steps = checkpoint.state["step"], config.steps
    if done > steps:
        raise ValueError(
            f"{config.run_dir}: {done} steps are done, --steps {steps} asks for fewer: nothing is left to train; give "
            f"--steps above {done}, or evaluate it (python -m eclip.evaluate --checkpoint {config.run_dir})"
        )


def _as_trained(saved: RunConfig, config: RunConfig) -> RunConfig:
    """The settings of a run that is complete: flags that no step was taken with are none of its own."""
    data = dataclasses.replace(saved.data, data_dir=config.data.data_dir)
    return dataclasses.replace(saved, run_dir=config.run_dir, resume=True, steps=config.steps, data=data)


def _tokenizer(config: RunConfig, index: ShardIndex, checkpoint: Found | None, start: Start | None) -> Tokenizer:
    """A new run's tokenizer, that of the run it starts from, or the resumed run's own."""
    if start is not None:
        what = f"the vocabulary of --start-from {start.path}"
        start.tokenizer.require_known(index.texts(), what, "start from a run on a catalogue of this language")
        return start.tokenizer
    if checkpoint is None:
        tokenizer = make_tokenizer(config, index)
        _require_known_titles(tokenizer, config, index)
        return tokenizer
    kept = read_tokenizer(config.run_dir, checkpoint.state.get("tokenizer"))
    given = config.vocab_file is not None and config.vocab_file.is_file()
    if given and _vocabulary(make_tokenizer(config, index)) != _vocabulary(kept):
        raise ValueError(
            f"--vocab-file {config.vocab_file}: not the vocabulary that {config.run_dir} was trained with; give the "
            f"same one or none"
        )
    return kept


def _require_known_titles(tokenizer: Tokenizer, config: RunConfig, index: ShardIndex) -> None:
    """Raise ValueError when the vocabulary is not that of the catalogue's language or case."""
    if config.vocab_file is None:
        tokenizer.require_known(index.texts(), f"the vocabulary of {tokenizer.vocab_size} pieces", "raise --vocab-size")
    else:
        case = "leave out --cased if its pieces are" if config.cased else "say --cased if its pieces are not"
        advice = f"give one of the catalogue's language, or {case} lower-case"
        tokenizer.require_known(index.texts(), f"--vocab-file {config.vocab_file}", advice)


def _vocabulary(tokenizer: Tokenizer) -> tuple[Any, Any]:
    """Pieces and their ids, and how text is normalised."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        record = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    return record["model"]["vocab"], record["normalizer"]


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
