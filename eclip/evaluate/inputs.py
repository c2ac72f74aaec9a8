"""What an evaluation is given, checked before anything is computed: numbers, a device, a catalogue.

A run records where its catalogue lies and a fingerprint of every split. Without --data-dir an evaluation takes that
place and no other data there; with it, any data, and says so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eclip.config import RunConfig
from eclip.dataloading.shards import ShardIndex
from eclip.parallel.device import choose_device
from eclip.training.checkpoint.run_folder import read_data_record

__all__ = ["Catalogue", "NoSplit", "OtherData", "check_numbers", "choose_device"]


class OtherData(ValueError):
    """The catalogue is not the one that the run knows, and nobody said that this is wanted."""


class NoSplit(ValueError):
    """The catalogue has no such split; one that is there and cannot be read is another matter."""


def check_numbers(
    batch_size: int, limit: int | None, threshold: float | Literal["auto"], decode_queries: int = 0
) -> None:
    """Raise ValueError for numbers that mean nothing."""
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: take at least one image at a time")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: evaluate at least one product, or leave it out")
    if decode_queries < 0:
        raise ValueError(f"--decode-queries {decode_queries}: give a number of queries, or leave it out for none")
    if threshold != "auto" and not (math.isfinite(threshold) and 0 < threshold < 1):
        raise ValueError(f"--threshold {threshold}: the score maps lie in [0, 1]; give a number between, or auto")


@dataclass(kw_only=True)
class Catalogue:
    """Where the splits of an evaluation come from, and what is known of them."""

    folder: Path
    chosen: bool
    """By --data-dir, instead of by the run."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the splits that lay there when training started; those of older runs are unknown."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know of the data."""

    @classmethod
    def of_run(cls, run_dir: Path, config: RunConfig, data_dir: Path | None) -> "Catalogue":
        """The catalogue of a run, or the one at `data_dir`. Raises ValueError when the folder is not there."""
        record = read_data_record(run_dir) or {}
        folder = data_dir or Path(record.get("data_dir") or config.data.data_dir)
        found = cls(folder=folder.resolve(), chosen=data_dir is not None, fingerprints=record.get("fingerprints", {}))
        if not found.folder.is_dir():
            whose = "" if found.chosen else f", where {run_dir} has its catalogue"
            raise ValueError(f"{found.folder}: no such folder{whose}; say where it is with --data-dir")
        if not folder.is_absolute() and not found.chosen:
            found.notes.append(
                f"the run names its catalogue only as {folder}: taken from the current directory, {found.folder}"
            )
        return found

    def open(self, split: str) -> ShardIndex:
        """A split's index. Raises NoSplit when there is none, OtherData when it is not the one the run knows, and
        ValueError when it cannot be read."""
        try:
            index = ShardIndex.open(self.folder, split)
        except ValueError as error:
            splits = sorted({path.name.rpartition("-")[0] for path in self.folder.glob("*-[0-9]*.tar")})
            if split in splits:
                raise
            if not splits:
                raise NoSplit(str(error)) from error
            raise NoSplit(
                f"--split {split}: {self.folder} holds {', '.join(splits)}; take one of these, "
                f"or another catalogue with --data-dir"
            ) from error
        known = self.fingerprints.get(split)
        if known == index.fingerprint:
            return index
        if known is not None and not self.chosen:
            raise OtherData(
                f"{self.folder}: its {split} split is not the one that lay there when the run was trained (fingerprint "
                f"{index.fingerprint[:12]}, then {known[:12]}); to evaluate on it all the same, give "
                f"--data-dir {self.folder}"
            )
        if self.chosen:
            what = "is not the one of the run" if known else "cannot be compared with the run's, which has no record"
            self._note(f"--data-dir {self.folder}: its {split} split {what}")
        return index

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
