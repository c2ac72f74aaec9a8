"""Which checkpoints are whole: every file as it was written, or the one before, said in a line."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from eclip.config import OptimConfig
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.training.checkpoint import save_checkpoint
from eclip.training.checkpoint.files import find_checkpoint, list_checkpoints, set_aside
from eclip.training.optim import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def _flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": ("__0_0.distcp", lambda p: os.truncate(p, p.stat().st_size - 1), r"bytes, \d+ were written"),
    "emptied": ("__0_0.distcp", lambda p: os.truncate(p, 0), r"0 bytes, \d+ were written"),
    "grown": ("__0_0.distcp", lambda p: os.truncate(p, p.stat().st_size + 512), r"bytes, \d+ were written"),
    "bit": ("__0_0.distcp", _flip, "its bytes are not those that were written"),
    "zeros": ("__0_0.distcp", lambda p: p.write_bytes(bytes(p.stat().st_size)), "its bytes are not those"),
    "gone": ("__0_0.distcp", Path.unlink, "missing"),
    "metadata emptied": (".metadata", lambda p: os.truncate(p, 0), r"0 bytes, \d+ were written"),
    "metadata bit": (".metadata", _flip, "its bytes are not those"),
    "metadata gone": (".metadata", Path.unlink, "missing"),
    "state gone": ("state.json", Path.unlink, "missing"),
    "state truncated": ("state.json", lambda p: os.truncate(p, p.stat().st_size // 2), "cannot be read"),
    "state emptied": ("state.json", lambda p: os.truncate(p, 0), "cannot be read"),
    "state no text": ("state.json", lambda p: p.write_bytes(b"\xff\xfe"), "cannot be read"),
    "state a list": ("state.json", lambda p: p.write_text("[]"), "holds no step"),
    "state's step": (
        "state.json", lambda p: p.write_text(p.read_text().replace('"step": 2', '"step": 3')), "its text is not",
    ),
    "state without digest": (
        "state.json", lambda p: p.write_text(re.sub(', "digest": "[0-9a-f]+"', "", p.read_text())), "digest is missing",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    model = ECLIP(PRESETS["debug"].model)
    for step in (1, 2):
        save_checkpoint(folder, step, model, None, build_optimizer(model, OptimConfig()), {}, ALONE)
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    name, harm, words = DAMAGE[kind]
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    first, second = list_checkpoints(run_dir)
    harm(second / name)
    found = find_checkpoint(run_dir)
    assert found is not None
    assert (found.path, found.damaged) == (first, (second,))
    (record,) = caplog.records
    assert re.fullmatch(f"damaged checkpoint: {second / name}: .*{words}.*; {first} is taken instead", record.message)
    harm(first / name) if "step" not in kind else shutil.rmtree(first)
    with pytest.raises(ValueError, match=rf"no checkpoint is whole \(.*{words}.*--overwrite") as error:
        find_checkpoint(run_dir)
    assert "\n" not in str(error.value)


def test_set_aside_checkpoints_do_not_count(two_checkpoints: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    first, second = list_checkpoints(run_dir)
    for _ in range(2):  # a later one of the same step replaces it
        set_aside([second])
        assert list_checkpoints(run_dir) == [first]
        shutil.copytree(first, second)
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name, second.name, f"{second.name}.damaged"]


def test_a_checkpoint_under_the_name_of_another_step(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole in itself, and the run would go on two steps away from where it says."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    copied = run_dir / "checkpoints" / "step_00000003"
    shutil.copytree(list_checkpoints(run_dir)[0], copied)
    found = find_checkpoint(run_dir)
    assert found is not None
    assert (found.state["step"], found.damaged) == (2, (copied,))
    assert "state.json: of step 1, which is not the folder's" in caplog.text
