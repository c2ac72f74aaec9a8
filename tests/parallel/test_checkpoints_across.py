"""A checkpoint does not know how its run was spread: every way reads every other's, to the bit; so does one process.

`hybrid` is on two "machines" of two ranks when it writes, of one rank each when two ranks read.
"""

from pathlib import Path

import pytest
import torch

from eclip.parallel.ranks import Ranks
from eclip.training.checkpoint import load_checkpoint
from tests.helpers import run_torchrun
from tests.parallel.spread_runs import WAYS, Run, everything

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

RANKS = """
import gc, os, sys
from pathlib import Path
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
os.environ |= {"LOCAL_RANK": str(rank % (world // 2)), "LOCAL_WORLD_SIZE": str(world // 2)}
import torch
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.training.checkpoint import load_checkpoint, save_checkpoint
from tests.parallel.spread_runs import WAYS, Run, everything

ranks, folder = start_ranks(find_ranks(timeout=60)), Path(sys.argv[1])

def write(way):
    run = Run(0, ranks, way)
    run.train(2)
    save_checkpoint(folder / way, 2, run.model, run.momentum, run.optimizer, {}, ranks)
    state = everything(run)
    if ranks.is_main:
        torch.save(state, folder / f"{way}.pt")
    ranks.barrier()

def read(written, way):
    run = Run(1, ranks, way)
    load_checkpoint(folder / written / "checkpoints" / "step_00000002", run.model, run.momentum, run.optimizer, ranks)
    expected, found = torch.load(folder / f"{written}.pt"), everything(run)
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), f"{name} written by {written}, read by {way}"
    run.train(1)

for way in WAYS:
    if world == 4:
        write(way)
        gc.collect()
for written in WAYS:
    for way in WAYS:
        read(written, way)
        gc.collect()
part(ranks)
print(f"rank {rank} done", flush=True)
"""


def test_every_way_reads_every_other(tmp_path: Path) -> None:
    for ranks in (4, 2):
        assert run_torchrun(RANKS, str(tmp_path), ranks=ranks).count("done") == ranks
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    for written in WAYS:
        run = Run(1, alone, "full")
        path = tmp_path / written / "checkpoints" / "step_00000002"
        load_checkpoint(path, run.model, run.momentum, run.optimizer, alone)
        expected, found = torch.load(tmp_path / f"{written}.pt"), everything(run)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), f"{name} written by {written}"
