"""One packing owns its folder: new shards are written aside and take the place of the old ones together.

A packing holds the lock `.pack.lock` and writes into the hidden folder `.packing`. When all is there, that folder is
renamed to `.packing-unfinished`, the old shards, their indexes and their record are moved into it, the new ones out of
it, the record last, and it gets its first name back and is removed. So a kill leaves one of two things: `.packing`,
which nobody reads, or `.packing-unfinished`, which readers refuse (`require_finished`) and from which the next packing
puts the old shards back. An error or a signal half way puts them back at once.

The record (`packing.json`, or `demo.json` of the embedded catalogue) lists the tars that a packing wrote: those are
replaced. A folder with tars of the same names that no record lists is somebody else's and is refused.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system.lock import alone

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
RECORD = "packing.json"
RECORDS = (RECORD, "demo.json")
REJECTED = "rejected.jsonl"
REFUSED = "rejected.refused.jsonl"
"""What a packing left out that wrote no shards, beside the shards of an earlier one and their `rejected.jsonl`."""
_ASIDE = ".packing"
_UNFINISHED = ".packing-unfinished"
_OLD = "old"  # the old files' folder within it
_MOVES = "moves.json"  # names of the new files: which of them were in place already is told by what is left
_VERSION = 1
_TAR = re.compile(r"([^/]+)-\d+\.tar")


def require_finished(data_dir: Path) -> None:
    """Raise ValueError when a packing was killed while it replaced the shards: they may be of two packings."""
    if os.path.lexists(data_dir / _UNFINISHED):
        raise ValueError(
            f"{data_dir}: a packing was stopped while it replaced the shards (or is at it), so they may be of two "
            f"packings ({_UNFINISHED} is there); pack again, which first puts the former ones back"
        )


@contextlib.contextmanager
def own(data_dir: Path, *, wait: bool) -> Iterator[None]:
    """Make `data_dir` and hold its lock; put right what a killed packing left there, and say so in the log.

    wait: until another packing has ended, else it is refused. Raises ValueError, also where no folder can be made.
    """
    busy = f"{data_dir}: {{holder}} is packing into this folder; wait until it has ended, or choose another one"
    with contextlib.ExitStack() as held:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(data_dir / ".pack.lock", busy=None if wait else busy))
            _recover(data_dir)
        except OSError as error:
            reasons: dict[type, str] = {
                FileExistsError: "it is a file",
                NotADirectoryError: "part of its path is a file",
            }
            reason = "it is a link to nowhere" if _dangles(data_dir) else reasons.get(type(error), error.strerror)
            at = f", {name}" if (name := os.path.basename(str(error.filename))) != data_dir.name else ""
            raise ValueError(f"{data_dir}: cannot be a folder of shards ({reason}{at}); choose another one") from None
        yield


def _dangles(path: Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _recover(data_dir: Path) -> None:
    aside, unfinished = data_dir / _ASIDE, data_dir / _UNFINISHED
    if os.path.lexists(unfinished):
        shutil.rmtree(aside, ignore_errors=True)
        _put_back(data_dir)
        log.warning("%s: a packing was killed while it replaced the shards; the former ones are back", data_dir)
    elif os.path.lexists(aside):
        log.warning("%s: removing what a killed packing left there", data_dir)
    shutil.rmtree(aside, ignore_errors=True)


def listed_tars(data_dir: Path, records: Sequence[str] = RECORDS) -> dict[str, int] | None:
    """Names and sizes of the tars that the folder's records list; None where no record can be read."""
    tars: dict[str, int] | None = None
    for name in records:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            files = json.loads((data_dir / name).read_text(encoding="utf-8"))["files"]
            tars = (tars or {}) | {str(f): int(size) for f, size in files.items() if _TAR.fullmatch(f)}
    return tars


def refuse_foreign(data_dir: Path, records: Sequence[str] = RECORDS) -> None:
    """Raise ValueError when the folder holds tars of the splits' names that no packing with these records wrote."""
    listed = listed_tars(data_dir, records)
    if listed is None and any((data_dir / name).is_file() for name in records):
        return  # a packing's folder, the record damaged
    foreign = sorted(_tars(data_dir, SPLITS) - (listed or {}).keys())
    if foreign:
        raise ValueError(
            f"{data_dir}: holds {foreign[0]}, which no record of a packing ({' or '.join(records)}) lists; "
            f"choose another folder, or delete its tars if they may go"
        )


def _tars(data_dir: Path, splits: tuple[str, ...]) -> set[str]:
    return {p.name for p in data_dir.glob("*.tar") if (m := _TAR.fullmatch(p.name)) and m[1] in splits}


def _replaced(data_dir: Path, only: str | None) -> list[str]:
    """Names of what new shards replace, the records first: all of an earlier packing, or one split."""
    if only is None:
        tars = _tars(data_dir, SPLITS) | (listed_tars(data_dir) or {}).keys()
    else:
        tars = _tars(data_dir, (only,))
    splits = {m[1] for name in tars if (m := _TAR.fullmatch(name))} | set(SPLITS if only is None else (only,))
    others = (REJECTED, REFUSED) if only is None else ()
    names = [*RECORDS, *others, *(f"{split}.index.npz" for split in sorted(splits)), *sorted(tars)]
    return [name for name in names if os.path.lexists(data_dir / name)]


@contextlib.contextmanager
def replace_shards(data_dir: Path, *, only: str | None = None) -> Iterator[Path]:
    """Yield an empty folder for new shards and their record; at the end of the block they replace the old ones.

    The caller owns `data_dir`. only: replace one split's tars and index, and leave those of the others. When the block
    raises, or the replacement fails, the folder is as it was before; an OSError (a full disk) and a KeyboardInterrupt
    come out with that said, the first as ValueError.
    """
    aside = data_dir / _ASIDE
    done = False
    try:
        aside.mkdir()
        yield aside
        with _signals_wait():
            _swap(data_dir, _replaced(data_dir, only))
            done = True
    except OSError as error:
        raise ValueError(f"{data_dir}: {_reason(data_dir, error)}; what was there before is as it was") from error
    except KeyboardInterrupt as stop:
        if not done:
            stop.args = (f"{data_dir}: stopped; what was there before is as it was",)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _reason(data_dir: Path, error: OSError) -> str:
    reason = f"not written ({error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(data_dir).free / 2**20
        return f"{reason}; {free:.0f} MiB free, and old and new shards stand side by side until the new ones are whole)"
    return f"{reason})"


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Keep SIGTERM, SIGHUP and Ctrl-C for the end of the block: some renames, milliseconds.

    By their handlers: a blocked signal would still reach the main thread's handler through any other thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for late in came:
            signal.raise_signal(late)


def _swap(data_dir: Path, old: list[str]) -> None:
    aside, unfinished = data_dir / _ASIDE, data_dir / _UNFINISHED
    new = sorted((path.name for path in aside.iterdir()), key=lambda name: (name in RECORDS, name))
    (aside / _OLD).mkdir()
    write_json(aside / _MOVES, new)
    _sync_folder(aside)
    aside.rename(unfinished)
    try:
        for name in old:
            (data_dir / name).rename(unfinished / _OLD / name)
        for name in new:
            (unfinished / name).rename(data_dir / name)
        _sync_folder(data_dir)
        unfinished.rename(aside)
    except BaseException:
        _put_back(data_dir)
        raise


def _put_back(data_dir: Path) -> None:
    """Undo a swap that did not end. It may itself be killed and done again: no file is removed before all are back."""
    unfinished = data_dir / _UNFINISHED
    try:
        moves = json.loads((unfinished / _MOVES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{unfinished / _MOVES}: unreadable ({error}), so the former shards cannot be put back; delete the tars of "
            f"{data_dir} and {unfinished.name}, and pack again"
        ) from error
    for name in moves:
        if not os.path.lexists(unfinished / name):
            with contextlib.suppress(FileNotFoundError):  # somebody deleted it
                (data_dir / name).rename(unfinished / name)
    for path in (unfinished / _OLD).iterdir():
        path.rename(data_dir / path.name)
    _sync_folder(data_dir)
    unfinished.rename(data_dir / _ASIDE)


def write_record(folder: Path, name: str, facts: Mapping[str, Any], *, others: Mapping[str, int] | None = None) -> None:
    """Write a packing's record into the folder of its new shards: facts, and the sizes of its tars and of `others`."""
    tars = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
    files = dict(sorted({**(others or {}), **tars}.items()))
    write_json(folder / name, {"version": _VERSION, **facts, "files": files})


def write_json(path: Path, content: Any) -> None:
    """Write UTF-8 JSON and have it on the disk."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
