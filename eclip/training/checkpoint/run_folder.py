"""A run's folder: what in it is a run's own, who writes there now, and how a start puts its files in place.

    config.json        the resolved settings, data.data_dir absolute
    data.json          {"data_dir": absolute path, "fingerprints": {split: hex}} of the splits that training saw
    tokenizer/tokenizer.json
    checkpoints/, metrics.jsonl, tensorboard/, wandb.json, profile/, evaluation*.json, grounding*.png, nonfinite_*.json
    .lock              held by rank 0 for the life of a run; launch.json says which torchrun began it

A start writes nothing here before every check has passed. Its files are then written aside (`.new`), the earlier run's
are deleted if that is wanted, and the new ones take their place. Only what a run wrote is ever deleted.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from eclip.config import RunConfig
from eclip.dataloading.system.lock import alone
from eclip.dataloading.text import Tokenizer
from eclip.files import PARTIAL, CannotWrite, cannot_write, replace_text, sha256, sync_folder, writing
from eclip.training.checkpoint.files import DAMAGED, delete, list_checkpoints

CONFIG, DATA, TOKENIZER, METRICS = "config.json", "data.json", "tokenizer/tokenizer.json", "metrics.jsonl"
LOCK = ".lock"
_READ_AS = "utf-8-sig"  # some editors begin what they save with a byte order mark
_NEW = ".new"
_OWN = (
    CONFIG, DATA, TOKENIZER, METRICS, "wandb.json", "launch.json", "evaluation*.json", "grounding*.png",
    "nonfinite_step*.json", "tensorboard/events.out.tfevents.*", "profile/trace.json.gz", "profile/operators.txt",
    f"checkpoints/step_*{DAMAGED}",
)  # fmt: skip
_UNFINISHED = (f"*.json{PARTIAL}", f"{METRICS}{PARTIAL}", f"checkpoints/step_*{PARTIAL}")
_FOLDERS = ("checkpoints", "tokenizer", "tensorboard", "profile")
_BUSY = "{}: a run writes there now ({}); wait for it, stop it or choose another --run-dir (evaluating it is fine)"
_LOCK_PATIENCE = 3.0  # seconds: a killed run's data workers, or the rank before a restart, may take one to be gone


def is_run(run_dir: Path) -> bool:
    """Whether a run of this program wrote to `run_dir`."""
    if list_checkpoints(run_dir):
        return True
    try:
        record = json.loads((run_dir / CONFIG).read_text(encoding=_READ_AS))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"preset", "run_dir", "model", "objective"} <= record.keys()


def check_usable(run_dir: Path) -> None:
    """Raise ValueError where a run may not write: a file, another program's folder. Changes nothing."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: a file; choose a folder for --run-dir")
    if run_dir.is_symlink() and not run_dir.exists():
        raise ValueError(
            f"{run_dir}: a link to {os.readlink(run_dir)}, which is not there; make that folder, mount its disk or "
            f"choose another --run-dir"
        )
    for name in _FOLDERS:
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise ValueError(f"{run_dir / name}: a file where a run has a folder; choose another --run-dir")
    for name in (CONFIG, DATA, TOKENIZER, METRICS, LOCK):
        if (run_dir / name).exists() and not (run_dir / name).is_file():
            raise ValueError(
                f"{run_dir / name}: no regular file, and a run has one of that name; move it away or choose another "
                f"--run-dir"
            )
    if not is_run(run_dir):
        foreign = [name for name in (CONFIG, DATA, *_FOLDERS, METRICS) if (run_dir / name).exists()]
        if foreign:
            raise ValueError(
                f"{run_dir} holds {foreign[0]}, which no run of this program wrote; choose another --run-dir"
            )


@contextmanager
def own(run_dir: Path) -> Iterator[None]:
    """Be the only run that writes to `run_dir`, made if absent. Raises ValueError when another one is.

    What is made here and stays empty goes again at the end.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    lock = run_dir / LOCK
    with ExitStack() as stack:
        try:
            with writing(lock):
                run_dir.mkdir(parents=True, exist_ok=True)
                _wait_for(lambda: stack.enter_context(alone(lock, busy=_BUSY.format(run_dir, "{holder}"))))
        except CannotWrite:
            _remove_unused(made)
            raise
        try:
            yield
        finally:
            _remove_unused(made)


def _remove_unused(made: Sequence[Path]) -> None:
    """Remove folders, the innermost first, with nothing but a lock in them."""
    with suppress(OSError):  # something has come into one
        for folder in made:
            if os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
            folder.rmdir()


def refuse_busy(run_dir: Path) -> None:
    """Raise ValueError when a run writes to `run_dir` now. Looks at the lock without touching its file."""

    def look() -> None:
        with suppress(OSError), (run_dir / LOCK).open(encoding="utf-8", errors="replace") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(_BUSY.format(run_dir, lock.read().strip() or "another process")) from None

    _wait_for(look)


def _wait_for(attempt: Callable[[], None]) -> None:
    """Call `attempt` until it raises no ValueError, or until that can no longer be a process about to be gone."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            return attempt()
        except ValueError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def install(
    run_dir: Path, config: RunConfig, data: Mapping[str, Any], tokenizer: Tokenizer | None, *, replace: bool
) -> None:
    """Put a start's files into its folder, which it owns. replace: delete what an earlier run wrote.

    tokenizer: None keeps the one that is there. Raises CannotWrite; unless that was in the middle of the deletion,
    everything is as it was.
    """
    new = run_dir / _NEW
    try:
        with writing(run_dir):
            delete(new)
            (new / "tokenizer").mkdir(parents=True)
        replace_text(new / CONFIG, config.to_json())
        replace_text(new / DATA, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        if tokenizer is not None:
            _save_tokenizer(tokenizer, new / TOKENIZER)
        with writing(run_dir):
            if replace:
                delete_run(run_dir)
            for unfinished in (p for pattern in _UNFINISHED for p in run_dir.glob(pattern)):
                delete(unfinished)
            for file in sorted(p for p in new.rglob("*") if p.is_file()):
                target = run_dir / file.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
                sync_folder(target.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    try:
        tokenizer.save(path.parent)
    except Exception as error:  # tokenizers raises no OSError for a full disk
        raise CannotWrite(cannot_write(path, error)) from error
    with writing(path), path.open("rb") as file:
        os.fsync(file.fileno())


def delete_run(run_dir: Path) -> None:
    """Delete what a run wrote and nothing else."""
    for path in (*list_checkpoints(run_dir), *(p for pattern in _OWN for p in run_dir.glob(pattern))):
        delete(path)
    for name in _FOLDERS:
        with suppress(OSError):  # absent, or another's files are in it
            (run_dir / name).rmdir()


def read_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run. Raises ValueError naming the file when it is missing or damaged."""
    path = run_dir / CONFIG
    try:
        return RunConfig.from_json(path.read_text(encoding=_READ_AS))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; restore it from a copy, or start anew with --overwrite") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; restore it from a copy, or start anew with --overwrite") from None


def read_data_record(run_dir: Path) -> dict[str, Any] | None:
    """data.json, None where an older version kept none. Raises ValueError naming the file when it is damaged."""
    path = run_dir / DATA
    try:
        record = json.loads(path.read_text(encoding=_READ_AS))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; restore it from a copy or delete it") from None
    if not isinstance(record, dict) or not isinstance(record.get("fingerprints"), dict):
        raise ValueError(f"{path}: holds no fingerprints; restore it from a copy or delete it")
    return record


def read_tokenizer(run_dir: Path, digest: str | None) -> Tokenizer:
    """The run's tokenizer. digest: SHA-256 of its file as a checkpoint knows it, None for unknown.

    Raises ValueError when it is missing, damaged or another one: the same ids would then mean other words.
    """
    path = run_dir / TOKENIZER
    if digest is not None and path.is_file() and sha256(path) != digest:
        raise ValueError(f"{path}: not the vocabulary that the weights were trained with (SHA-256 differs); restore it")
    try:
        return Tokenizer.load(path.parent)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path}: cannot be read ({error}); restore it from a copy") from None
