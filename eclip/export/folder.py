"""The folder of an export: whole or absent. It is filled aside and then renamed; nothing of another program is deleted.

    OUT            as it was, until all of it is there
    OUT.partial    while it is being written; of a killed export when nobody writes
    .OUT.old-*     the earlier export, for as long as two renames take
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from eclip.dataloading.system.lock import alone
from eclip.files import PARTIAL, CannotWrite, cannot_write, sync_folder
from eclip.training.checkpoint.run_folder import is_run
from eclip.weights.exported import CONFIG, TOKENIZER, WEIGHTS, is_exported

CARD, TOWERS, ONNX = "README.md", "towers", "onnx"
_LOCK = ".lock"
_OWN = {CONFIG, WEIGHTS, TOKENIZER, CARD, TOWERS, ONNX, _LOCK}


def check_place(out: Path, run_dir: Path, *, overwrite: bool) -> None:
    """Raise ValueError where an export may not go: over a file, a run, another program's folder, and without
    `overwrite` over an earlier export. Changes nothing."""
    if out.resolve() == run_dir.resolve() or is_run(out):
        raise ValueError(f"--out {out}: a run's folder; choose one of its own for the export")
    if out.is_symlink() and not out.exists():
        raise ValueError(f"--out {out}: a link to {os.readlink(out)}, which is not there; choose another --out")
    partial = out.resolve().with_name(out.resolve().name + PARTIAL)
    if partial.exists() and not (partial / _LOCK).exists() and (not partial.is_dir() or any(partial.iterdir())):
        raise ValueError(f"{partial}: in the way, and no export wrote it; move it away or choose another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out}: a file; choose a folder")
    names = {path.name for path in out.iterdir()}
    foreign = sorted(names if not is_exported(out) else names - _OWN)
    if foreign:
        raise ValueError(
            f"--out {out}: holds {foreign[0]}, which no export wrote and none deletes; move it away or choose another "
            f"--out"
        )
    if names and not overwrite:
        raise ValueError(f"--out {out}: holds an earlier export; replace it with --overwrite or choose another --out")


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` at the end of the block, in place of an earlier export there.

    When the block fails nothing is left of it and `out` is as it was. Raises CannotWrite, ValueError when another
    process exports to `out`.
    """
    out = out.resolve()  # where it is a link, its target is replaced
    partial = out.with_name(out.name + PARTIAL)
    busy = f"--out {out.name}: another export writes it now ({{holder}}); wait for it or choose another --out"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with alone(partial / _LOCK, busy=busy):
            try:
                _empty(partial)
                yield partial
                _place(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CannotWrite(cannot_write(out, error, flag="--out")) from error


def _empty(partial: Path) -> None:
    """Of a killed export."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _place(partial: Path, out: Path) -> None:
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync_folder(folder)
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) if out.exists() else None
    try:
        if old is not None:
            out.rename(old)  # onto an empty folder
        partial.rename(out)
    except OSError:
        if old is not None and not out.exists():
            with suppress(OSError):
                old.rename(out)
        raise
    (out / _LOCK).unlink()
    sync_folder(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
