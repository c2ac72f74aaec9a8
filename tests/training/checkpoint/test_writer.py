"""Checkpoints in the background: the same files, whole or not there, and errors that every rank hears of."""

import errno
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from eclip.config import OptimConfig
from eclip.files import CannotWrite
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import Ranks
from eclip.presets import PRESETS
from eclip.training.checkpoint import CheckpointWriter, load_checkpoint, writer
from eclip.training.checkpoint.files import find_checkpoint, list_checkpoints
from eclip.training.momentum import make_momentum
from eclip.training.optim import build_optimizer
from tests.helpers import file_size_limit, run_torchrun

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
Run = tuple[ECLIP, ECLIP, torch.optim.Optimizer]


def _run(seed: int = 0) -> Run:
    """After one step."""
    torch.manual_seed(seed)
    model = ECLIP(PRESETS["debug"].model)
    run = model, make_momentum(model), build_optimizer(model, OptimConfig())
    (model.encode_image(torch.randn(2, 3, 32, 32)).cls.square().mean() * model.scale()).backward()
    run[2].step()
    run[2].zero_grad()
    return run


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The thread writes once it is set."""
    gate, write = threading.Event(), writer.write_checkpoint

    def wait_and_write(*args: Any, **options: Any) -> Path:
        assert gate.wait(30)
        return write(*args, **options)

    monkeypatch.setattr(writer, "write_checkpoint", wait_and_write)
    return gate


def test_the_copy_is_of_the_step_that_was_saved(tmp_path: Path, gate: threading.Event) -> None:
    """The loop goes on and changes everything before a byte is written."""
    run = _run()
    before = {key: value.clone() for key, value in run[0].state_dict().items()}
    moments = {key: value.clone() for key, value in run[2].state[run[0].logit_scale].items()}
    with CheckpointWriter(tmp_path, ALONE, background=True) as checkpoints:
        checkpoints.save(1, *run, {"loader": {"step": 1}})
        with torch.no_grad():
            for tensor in [*run[0].parameters(), *run[1].parameters()]:
                tensor.add_(1)
            for entry in run[2].state.values():
                for tensor in entry.values():
                    tensor.add_(1)
        assert list_checkpoints(tmp_path) == []
        gate.set()
    (path,) = list_checkpoints(tmp_path)
    other = _run(1)
    assert load_checkpoint(path, *other, ALONE)["loader"] == {"step": 1}
    assert all(torch.equal(value, before[key]) for key, value in other[0].state_dict().items())
    assert all(torch.equal(value, moments[key]) for key, value in other[2].state[other[0].logit_scale].items())


def test_one_at_a_time_and_old_ones_go(tmp_path: Path) -> None:
    run = _run()
    with CheckpointWriter(tmp_path, ALONE, keep=2, background=True) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, *run, {})
            assert sum(thread.name == "checkpoint" for thread in threading.enumerate()) <= 1
        checkpoints.finish()
        assert _names(tmp_path) == ["step_00000002", "step_00000003"]
    found = find_checkpoint(tmp_path)
    assert found is not None and not found.damaged


@pytest.mark.parametrize("background", [False, True])
def test_a_step_is_written_once(tmp_path: Path, background: bool) -> None:
    """The stop after a checkpoint has little time, and the first one knows the loss of the val split."""
    run = _run()
    with CheckpointWriter(tmp_path, ALONE, background=background) as checkpoints:
        checkpoints.save(1, *run, {"val_loss": 2.0})
        checkpoints.save(1, *run, {})
    found = find_checkpoint(tmp_path)
    assert found is not None and found.state["val_loss"] == 2.0


def test_an_error_is_told_at_the_next_call(tmp_path: Path) -> None:
    run = _run()
    checkpoints = CheckpointWriter(tmp_path, ALONE, background=True)
    checkpoints.save(1, *run, {})
    checkpoints.finish()
    with file_size_limit(20_000):
        checkpoints.save(2, *run, {})
        assert checkpoints._thread is not None
        checkpoints._thread.join()
    with pytest.raises(CannotWrite, match="step_00000002.partial: cannot be written"):
        checkpoints.save(3, *run, {})
    assert _names(tmp_path) == ["step_00000001"]
    checkpoints.save(2, *run, {})  # told once; this step is not taken for written
    checkpoints.finish()
    assert _names(tmp_path) == ["step_00000001", "step_00000002"]


def _save_and_fail(run_dir: Path, run: Run, step: int) -> None:
    with CheckpointWriter(run_dir, ALONE, background=True) as checkpoints:
        checkpoints.save(step, *run, {})
        raise ZeroDivisionError


def test_an_error_of_the_loop_waits_and_is_the_one_that_is_told(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run()
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(ZeroDivisionError):
        _save_and_fail(tmp_path, run, 1)
    assert _names(tmp_path) == ["step_00000001"]

    def full(*args: Any, **options: Any) -> Path:
        raise CannotWrite("full") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_checkpoint", full)
    with pytest.raises(ZeroDivisionError):
        _save_and_fail(tmp_path, run, 2)
    # Another rank is gone, and its part never comes.
    monkeypatch.setattr(writer, "_PATIENCE", 0.1)
    monkeypatch.setattr(writer, "write_checkpoint", lambda *args, **options: time.sleep(2))
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        _save_and_fail(tmp_path, run, 2)
    assert time.monotonic() - began < 1.5


@pytest.mark.gpu
def test_a_copy_from_a_gpu_is_that_of_the_step(tmp_path: Path) -> None:
    """The stream goes on at once, and the copy through pinned memory has still what was there."""
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cuda"), mesh=None)
    model = ECLIP(PRESETS["debug"].model).cuda()
    run = model, make_momentum(model), build_optimizer(model, OptimConfig())
    before: dict[str, torch.Tensor] = {}
    with CheckpointWriter(tmp_path, ranks, background=True) as checkpoints:
        for step in (1, 2):  # the second one into the memory of the first
            before = {key: value.cpu() for key, value in model.state_dict().items()}
            checkpoints.save(step, *run, {})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
    other = _run(1)
    load_checkpoint(list_checkpoints(tmp_path)[-1], *other, ALONE)
    assert all(torch.equal(value, before[key]) for key, value in other[0].state_dict().items())


RANKS = r"""
import gc, resource, sys
from pathlib import Path
import torch
from eclip.config import OptimConfig
from eclip.files import CannotWrite
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.parallel.sharding import shard
from eclip.presets import PRESETS
from eclip.training.checkpoint import CheckpointWriter, load_checkpoint, save_checkpoint
from eclip.training.checkpoint.files import find_checkpoint, list_checkpoints
from eclip.training.optim import build_optimizer

run_dir, beside = Path(sys.argv[1]), Path(sys.argv[2])
ranks = start_ranks(find_ranks(timeout=60))

class Root(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        return self.model.encode_image(x).cls.square().mean() * self.model.scale()

def step():
    root(torch.randn(2, 3, 32, 32)).backward()
    optimizer.step()
    optimizer.zero_grad()

torch.manual_seed(0)
root = Root(ECLIP(PRESETS["debug"].model))
shard(root, ranks.mesh)
optimizer = build_optimizer(root.model, OptimConfig())
checkpoints = CheckpointWriter(run_dir, ranks, background=True)
for number in (1, 2, 3):
    step()
    if number == 3:
        save_checkpoint(beside, 3, root.model, None, optimizer, {}, ranks)
    checkpoints.save(number, root.model, None, optimizer, {})
    for _ in range(3):  # the main thread talks meanwhile, through its groups
        step()
        ranks.highest(0)
        ranks.gather("x" * 1000)
    if number == 2:
        checkpoints.finish()
        load_checkpoint(run_dir / "checkpoints/step_00000002", root.model, None, optimizer, ranks)
checkpoints.finish()
for folder in (run_dir, beside):
    load_checkpoint(folder / "checkpoints/step_00000003", root.model, None, optimizer, ranks)
    weights = {n: p.to_local().clone() for n, p in root.model.named_parameters()}
    found = [weights, {n: optimizer.state[p]["exp_avg"].to_local().clone() for n, p in root.model.named_parameters()
                       if p in optimizer.state}]
    if folder == run_dir:
        kept = found
assert all(torch.equal(a[name], b[name]) for a, b in zip(kept, found) for name in a) and found[1]
# One rank's disk is full: every rank learns of it.
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if ranks.rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
checkpoints.save(4, root.model, None, optimizer, {})
try:
    checkpoints.finish()
except CannotWrite as error:
    print(f"rank {ranks.rank} refused: {error}\n", end="", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
ranks.barrier()
assert [p.name for p in list_checkpoints(run_dir)] == ["step_00000002", "step_00000003"]
assert find_checkpoint(run_dir, ranks).path.name == "step_00000003"
del root, optimizer, checkpoints
gc.collect()
part(ranks)
"""


def test_two_ranks_write_while_they_train(tmp_path: Path) -> None:
    output = run_torchrun(RANKS, str(tmp_path / "run"), str(tmp_path / "beside"))
    for rank in (0, 1):
        assert re.search(rf"rank {rank} refused: .*step_00000004.partial: cannot be written \(.*File too large", output)
