"""The files of checkpoints: which there are, whether they are whole, and how one is put in place.

    run_dir/checkpoints/step_00000200/            whole when every file has the size and digest that state.json names
    run_dir/checkpoints/step_00000200.partial     being written; of a dead run when nobody writes
    run_dir/checkpoints/step_00000200.damaged     set aside by a resume that continued from the one before

state.json: {"step", "world_size", what the trainer adds ("loader", and "val_loss" of a step that was validated: the
checkpoint with the lowest one is the best, and stays), "tokenizer": digest, "files": {name: {"bytes", "sha256"}},
"digest": of all the rest}. Digests cost 0.55 s per GiB and core (a save of 0.75 GiB: 0.4 of 2.7 s); each rank computes
those of its own files and, when a checkpoint is opened, an equal share.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eclip.files import PARTIAL, replace_text, sha256, sync_folder
from eclip.parallel.ranks import Ranks

log = logging.getLogger(__name__)

DAMAGED = ".damaged"
STATE = "state.json"
_STEP = re.compile(r"step_(\d{8,})")
FileFacts = dict[str, dict[str, Any]]
Which = Literal["newest", "best"]
"""Of a run's checkpoints: the best has the lowest loss of the val split, where training computed it."""


class Damaged(ValueError):
    """A checkpoint that is not whole: which file, and what differs."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    path: Path
    state: dict[str, Any]
    """state.json"""
    damaged: tuple[Path, ...]
    """Newer ones that are not whole."""


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, whole or not, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def find_checkpoint(run_dir: Path, ranks: Ranks | None = None, *, which: Which = "newest") -> Found | None:
    """The newest (or best) whole checkpoint, None when there is no checkpoint; damaged ones are named in the log.

    Every rank must call it when `ranks` are given: they share the reading. Raises ValueError when none is whole, or
    when the best is asked for and none has a loss of the val split.
    """
    look = list_checkpoints if which == "newest" else _from_worst_to_best
    folders = look(run_dir) if ranks is None else ranks.from_main(lambda: look(run_dir))
    reasons: list[str] = []
    for path in reversed(folders):
        problem = _problem(path, ranks)
        if problem is None:
            if ranks is None or ranks.is_main:
                for reason in reasons:
                    log.warning("damaged checkpoint: %s; %s is taken instead", reason, path)
            return Found(path, read_state(path), tuple(reversed(folders))[: len(reasons)])
        reasons.append(problem)
    if reasons:
        raise ValueError(
            f"{run_dir}: no checkpoint is whole ({'; '.join(reasons)}); restore one from a copy, or start anew with "
            f"--overwrite"
        )
    return None


def _from_worst_to_best(run_dir: Path) -> list[Path]:
    losses = _val_losses(list_checkpoints(run_dir))
    if not losses and list_checkpoints(run_dir):
        raise ValueError(
            f"{run_dir}: no checkpoint has a loss of the val split, so none is the best; take the newest, or train "
            f"with --validate-every"
        )
    return sorted(losses, key=lambda path: (losses[path], _step_of(path)), reverse=True)


def lowest_val_loss(run_dir: Path) -> float:
    """Of the checkpoints that are there, infinity when none has one."""
    return min(_val_losses(list_checkpoints(run_dir)).values(), default=math.inf)


def _val_losses(checkpoints: Iterable[Path]) -> dict[Path, float]:
    """Loss of the val split of each checkpoint whose state.json tells one."""
    losses = {}
    for path in checkpoints:
        with suppress(Damaged):
            state = read_state(path)
            if isinstance(state.get("val_loss"), float):
                losses[path] = state["val_loss"]
    return losses


def _problem(path: Path, ranks: Ranks | None) -> str | None:
    """What is wrong with a checkpoint, the same on every rank."""
    share = slice(None) if ranks is None else slice(ranks.rank, None, ranks.world_size)
    try:
        _check(path, share)
        mine = None
    except (Damaged, OSError) as error:
        mine = str(error)
    found = [mine] if ranks is None else ranks.gather(mine)
    return next((problem for problem in found if problem is not None), None)


def _check(path: Path, share: slice) -> None:
    state = read_state(path)
    if state["step"] != _step_of(path):
        raise Damaged(f"{path / STATE}: of step {state['step']}, which is not the folder's; was it copied or renamed?")
    files = state.get("files")
    if files is None:  # written before digests were kept
        if not (path / ".metadata").is_file():
            raise Damaged(f"{path / '.metadata'}: missing")
        return
    for name in sorted(files)[share]:
        file, facts = path / name, files[name]
        if not file.is_file():
            raise Damaged(f"{file}: missing")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise Damaged(f"{file}: {size} bytes, {facts['bytes']} were written")
        if sha256(file) != facts["sha256"]:
            raise Damaged(f"{file}: its bytes are not those that were written (SHA-256 differs)")


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises Damaged when it is missing or not what was written."""
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{file}: missing") from None
    except (ValueError, OSError) as error:
        raise Damaged(f"{file}: cannot be read ({error})") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise Damaged(f"{file}: holds no step")
    digest = state.pop("digest", None)
    if digest is not None and digest != _digest(state):
        raise Damaged(f"{file}: its text is not the one that was written (SHA-256 differs)")
    if digest is None and "files" in state:
        raise Damaged(f"{file}: its digest is missing")
    return state


def file_facts(files: Iterable[Path]) -> FileFacts:
    """Size and digest of each file, by name."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


def own_files(partial: Path, ranks: Ranks) -> list[Path]:
    """The files that this rank wrote; rank 0 also answers for those of no rank (.metadata)."""
    prefix = f"__{ranks.rank}_"
    return [
        p for p in sorted(partial.iterdir())
        if p.name.startswith(prefix) or (ranks.is_main and not p.name.startswith("__"))
    ]  # fmt: skip


def put_in_place(partial: Path, state: Mapping[str, Any]) -> Path:
    """Complete `partial` by state.json and give it its name; returns the checkpoint. Raises CannotWrite.

    What has that name already is not whole, or this checkpoint again: it goes once the new one is on the disk.
    """
    text = json.dumps(state)
    replace_text(partial / STATE, json.dumps({**json.loads(text), "digest": _digest(json.loads(text))}))
    sync_folder(partial)
    final = partial.with_suffix("")
    replaced = final.with_suffix(".replaced" + PARTIAL)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def keep_newest(run_dir: Path, step: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `step`, and the best of these.

    A kill in between leaves no half one of that name.
    """
    found = [p for p in list_checkpoints(run_dir) if _step_of(p) <= step]
    losses = _val_losses(found)
    best = min(losses, key=lambda path: (losses[path], _step_of(path)), default=None)
    for old in found[:-keep]:
        if old != best:
            dying = old.with_name(old.name + PARTIAL)
            delete(dying)
            delete(old.rename(dying))


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename what is not whole, so that it is not taken for a checkpoint again and does not count as one."""
    for path in damaged:
        target = path.with_name(path.name + DAMAGED)
        delete(target)
        path.rename(target)


def delete(path: Path) -> None:
    """Remove a file, a folder, a link to one, or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
