"""Saving and loading: everything comes back, nothing half-written is taken, misfits are named."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eclip.config import OptimConfig
from eclip.dataloading.text import Tokenizer
from eclip.files import CannotWrite
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.training.checkpoint import load_checkpoint, load_run, save_checkpoint
from eclip.training.checkpoint.files import find_checkpoint, list_checkpoints
from eclip.training.momentum import make_momentum, update_momentum
from eclip.training.optim import build_optimizer
from tests.helpers import file_size_limit, run_torchrun

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
CONFIG = PRESETS["debug"].model
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
Run = tuple[ECLIP, ECLIP, torch.optim.Optimizer]


def _new(seed: int) -> Run:
    torch.manual_seed(seed)
    model = ECLIP(CONFIG)
    model.text_encoder.requires_grad_(False)
    return model, make_momentum(model), build_optimizer(model, OptimConfig())


def _train(run: Run, steps: int) -> None:
    """Some gradients; the matching head never gets one, as in a run without L_itm."""
    model, momentum, optimizer = run
    for _ in range(steps):
        features = model.encode_image(torch.randn(2, 3, 32, 32))
        (features.cls.square().mean() * model.scale()).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_momentum(model, momentum, 0.9)


@pytest.fixture(scope="module")
def trained() -> Run:
    run = _new(0)
    _train(run, 2)
    return run


def _newest(run_dir: Path) -> Path | None:
    found = find_checkpoint(run_dir)
    return found.path if found else None


def test_everything_comes_back(trained: Run, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 2, *trained, {"loader": {"step": 2}}, ALONE)
    assert path == _newest(tmp_path)
    other = _new(1)
    state = load_checkpoint(path, *other, ALONE)
    assert {name: state[name] for name in ("step", "world_size", "loader")} == {
        "step": 2, "world_size": 1, "loader": {"step": 2},
    }  # fmt: skip
    for one, two in zip(trained[:2], other[:2], strict=True):
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    # The next step is the same to the bit: moments and step counters are there, and only where they were.
    assert len(other[2].state) == len(trained[2].state)
    torch.manual_seed(5)
    _train(other, 1)
    again = _new(1)
    load_checkpoint(path, *again, ALONE)
    torch.manual_seed(5)
    _train(again, 1)
    assert all(torch.equal(a, b) for a, b in zip(other[0].parameters(), again[0].parameters(), strict=True))


def test_shared_towers_are_stored_once(trained: Run, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    path = save_checkpoint(tmp_path, 1, *trained, {}, ALONE)
    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    assert any(key.startswith("model.text_encoder.") for key in keys)
    assert any(key.startswith("momentum.image_encoder.") for key in keys)
    assert not any(key.startswith("momentum.text_encoder.") for key in keys)
    assert not any(key.startswith("optimizer.text_encoder.") for key in keys)


def test_only_complete_checkpoints_count_and_old_ones_go(trained: Run, tmp_path: Path) -> None:
    assert _newest(tmp_path) is None
    for step in (2, 10, 100):
        save_checkpoint(tmp_path, step, *trained, {}, ALONE, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000100"]
    for name in ("step_00000200.partial", "step_00000300", "step_00000400.damaged", "step_tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert _newest(tmp_path) == tmp_path / "checkpoints" / "step_00000100"
    # The same step again replaces the old one.
    save_checkpoint(tmp_path, 100, *trained, {"again": True}, ALONE)
    assert load_checkpoint(tmp_path / "checkpoints" / "step_00000100", *_new(1), ALONE)["again"]
    assert (tmp_path / "checkpoints" / "step_00000010").is_dir()  # what is newer and not whole does not count


@pytest.fixture(scope="module")
def two_checkpoints(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save_checkpoint(folder, step, *trained, {}, ALONE)
    return folder


def test_a_checkpoint_of_an_older_version_is_taken_or_named(two_checkpoints: Path, tmp_path: Path) -> None:
    """It has no digests: what is wrong with it shows when it is read, in one line."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    shutil.rmtree(list_checkpoints(run_dir)[0])
    (path,) = list_checkpoints(run_dir)
    (path / "state.json").write_text(json.dumps({"step": 2, "world_size": 1}))
    assert _newest(run_dir) == path
    assert load_checkpoint(path, *_new(1), ALONE)["step"] == 2
    whole = (path / "__0_0.distcp").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", bytes(len(whole))):
        (path / "__0_0.distcp").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}: cannot be read .*; remove the folder"):
            load_checkpoint(path, *_new(1), ALONE)
    (path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"\.metadata: cannot be read .*; remove the folder"):
        load_checkpoint(path, *_new(1), ALONE)


@pytest.mark.parametrize("limit", [0, 64, 20_000])
def test_a_full_disk_keeps_the_checkpoints_that_are_there(
    two_checkpoints: Path, tmp_path: Path, trained: Run, limit: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    before = _contents(run_dir)
    with (
        file_size_limit(limit),
        pytest.raises(CannotWrite, match="step_00000003.partial.* cannot be written") as error,
    ):
        save_checkpoint(run_dir, 3, *trained, {}, ALONE, keep=1)
    assert "\n" not in str(error.value)
    assert _contents(run_dir) == before
    save_checkpoint(run_dir, 3, *trained, {}, ALONE, keep=1)
    assert [p.name for p in list_checkpoints(run_dir)] == ["step_00000003"]


@pytest.mark.parametrize("place", ["state.json", "mkdir", "rename"])
def test_a_disk_that_fills_at_the_end(
    two_checkpoints: Path, tmp_path: Path, trained: Run, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    before = _contents(run_dir)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(method: Any, name: str) -> Any:
        def run(self: Path, *args: Any, **options: Any) -> Any:
            if name in self.name:
                raise full
            return method(self, *args, **options)

        return run

    patched = {"state.json": "open", "mkdir": "mkdir", "rename": "rename"}[place]
    monkeypatch.setattr(Path, patched, fail(getattr(Path, patched), "state.json" if place == "state.json" else "step_"))
    with pytest.raises(CannotWrite, match="No space left on device; .* MiB are free"):
        save_checkpoint(run_dir, 3, *trained, {}, ALONE, keep=1)
    monkeypatch.undo()
    assert _contents(run_dir) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


RANKS = r"""
import gc, os, resource, sys
from pathlib import Path
import torch
from eclip.training.checkpoint import load_checkpoint, save_checkpoint
from eclip.training.checkpoint.files import find_checkpoint, list_checkpoints
from eclip.config import OptimConfig
from eclip.files import CannotWrite
from eclip.model.eclip import ECLIP
from eclip.training.optim import build_optimizer
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.parallel.sharding import shard
from eclip.presets import PRESETS

run_dir = Path(sys.argv[1])
ranks = start_ranks(find_ranks(timeout=60))

class Root(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        return self.model.encode_image(x).cls.square().mean() * self.model.scale()

torch.manual_seed(0)
root = Root(ECLIP(PRESETS["debug"].model))
shard(root, ranks.mesh)
optimizer = build_optimizer(root.model, OptimConfig())
root(torch.randn(2, 3, 32, 32)).backward()
optimizer.step()
root.model.clamp_logit_scale()
for step in (1, 2):
    save_checkpoint(run_dir, step, root.model, None, optimizer, {}, ranks)
# One rank's disk is full: every rank learns of it, nobody waits.
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if ranks.rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
try:
    save_checkpoint(run_dir, 3, root.model, None, optimizer, {}, ranks)
except CannotWrite as error:
    refusal = error
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
print(f"rank {ranks.rank} refused: {refusal}\n", end="", flush=True)
ranks.barrier()
assert [p.name for p in list_checkpoints(run_dir)] == ["step_00000001", "step_00000002"]
# Damage in rank 1's file is seen by all.
if ranks.is_main:
    with open(run_dir / "checkpoints/step_00000002/__1_0.distcp", "r+b") as file:
        file.seek(2000)
        file.write(b"damage")
ranks.barrier()
found = find_checkpoint(run_dir, ranks)
names = [p.name for p in found.damaged]
print(f"rank {ranks.rank} found {found.path.name}, damaged {names}\n", end="", flush=True)
assert load_checkpoint(found.path, root.model, None, optimizer, ranks)["world_size"] == 2
del root, optimizer
gc.collect()
part(ranks)
"""


def test_ranks_agree_on_failures_and_on_what_is_whole(tmp_path: Path) -> None:
    output = run_torchrun(RANKS, str(tmp_path))
    for rank in (0, 1):
        assert re.search(rf"rank {rank} refused: .*step_00000003.partial: cannot be written \(.*File too large", output)
        assert f"rank {rank} found step_00000001, damaged ['step_00000002']" in output
    assert output.count("damaged checkpoint: ") == 1


def test_misfit_is_named(trained: Run, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {}, ALONE)
    wider = ECLIP(dataclasses.replace(CONFIG, embed_dim=48))
    with pytest.raises(ValueError, match=r"image_projection.weight of shape \(48, 32\) has shape \(32, 32\) there"):
        load_checkpoint(path, wider, None, build_optimizer(wider, OptimConfig()), ALONE)
    deeper = ECLIP(dataclasses.replace(CONFIG, decoder_depth=2))
    with pytest.raises(ValueError, match=r"instance_decoder.blocks.1.* is not in it"):
        load_checkpoint(path, deeper, None, build_optimizer(deeper, OptimConfig()), ALONE)


@pytest.mark.parametrize("saved", [True, False])
def test_other_locks_are_a_misfit(tmp_path: Path, saved: bool) -> None:
    """A locked tower's momentum copy is the tower itself and not stored: it must not be replaced in silence."""

    def run(locked: bool) -> Run:
        model = ECLIP(CONFIG)
        model.image_encoder.requires_grad_(not locked)
        return model, make_momentum(model), build_optimizer(model, OptimConfig())

    path = save_checkpoint(tmp_path, 1, *run(saved), {}, ALONE)
    words = r"momentum\.image_encoder\..* is not in it" if saved else r"holds momentum\.image_encoder\..*no place for"
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path, *run(not saved), ALONE)


def test_a_scale_beyond_its_range_is_brought_back(tmp_path: Path) -> None:
    """Older versions clamped in the forward pass and let the parameter run away."""
    model, momentum, optimizer = _new(0)
    for part in (model, momentum):
        part.logit_scale.data.fill_(7.0)
    path = save_checkpoint(tmp_path, 1, model, momentum, optimizer, {}, ALONE)
    other = _new(1)
    load_checkpoint(path, *other, ALONE)
    assert [part.scale().item() for part in other[:2]] == pytest.approx([100.0, 100.0])


def test_load_run(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_run(tmp_path)
    # Opening a run must not need the files it was started from.
    config = dataclasses.replace(PRESETS["debug"], run_dir=tmp_path, image_weights=Path("gone.safetensors"))
    (tmp_path / "config.json").write_text(config.to_json())
    Tokenizer.train(["red sofa", "blue lamp"], 64).save(tmp_path / "tokenizer")
    save_checkpoint(tmp_path, 1, *trained, {}, ALONE)
    model, loaded, tokenizer = load_run(tmp_path)
    assert loaded == config
    assert not model.training
    assert tokenizer.encode(["red sofa"])[0].numel() >= 4
    for (name, a), b in zip(trained[0].state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
