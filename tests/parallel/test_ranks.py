"""Ranks: host work is ordered on the host, whatever device collectives do."""

import signal
from pathlib import Path

import pytest
import torch

from eclip.parallel.ranks import Ranks, find_ranks, start_ranks
from tests.helpers import run_torchrun
from tests.twelve_products import write_twelve_products

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert find_ranks(timeout=1) is None
    ranks = start_ranks(None)
    ranks.barrier()
    assert ranks.from_main(lambda: "made") == "made"
    assert ranks.gather(3) == [3]
    assert ranks.highest(signal.SIGTERM) == signal.SIGTERM
    with pytest.raises(OSError, match="full"):
        ALONE.from_main(_full)


@pytest.mark.parametrize(
    "local_rank, gpus, words",
    [
        ("2", 2, "LOCAL_RANK=2 in .* 2 GPUs are here.*--nproc-per-node=2"),
        ("1", 1, "1 GPU is"),
        ("", 4, "not in the env"),
    ],
)
def test_a_rank_without_a_gpu(local_rank: str, gpus: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=words):
        start_ranks(None)


def _full() -> None:
    raise OSError("full")


WORKER = """
import gc, json, os, sys
from contextlib import ExitStack
from pathlib import Path
import torch
import torch.distributed as dist

# NCCL's collectives are enqueued: the host goes on at once, before anything was exchanged.
real = dist.all_reduce, dist.all_gather_into_tensor, dist.reduce_scatter_tensor
dist.all_reduce = dist.all_gather_into_tensor = dist.reduce_scatter_tensor = lambda *args, **options: None

from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.training.prepare import prepare
from eclip.presets import PRESETS
from eclip.parallel.watch import PeerFailed
import dataclasses

folder, data = Path(sys.argv[1]), Path(sys.argv[2])
ranks = start_ranks(find_ranks(timeout=60))
other = ranks.watch.store

for round in range(20):
    fact = folder / f"fact{round}"
    if ranks.is_main:
        other.wait([f"waiting{round}"])  # rank 1 is at the barrier, or a moment before it
        fact.write_text("known")
    else:
        other.set(f"waiting{round}", "")
    ranks.barrier()
    assert fact.read_text() == "known"

pid = ranks.from_main(os.getpid)
assert (pid == os.getpid()) == ranks.is_main
assert ranks.gather(os.getpid())[0] == pid
try:
    ranks.from_main(lambda: (folder / "nothing").read_text())
except (PeerFailed, FileNotFoundError) as error:
    assert isinstance(error, FileNotFoundError) == ranks.is_main

base = PRESETS["debug"]
config = dataclasses.replace(
    base, evaluate=False, run_dir=folder / "run", data=dataclasses.replace(base.data, data_dir=data)
)
with ExitStack() as hold:
    prepared = prepare(config, ranks, hold)
    prepared.commit(ranks)
    assert (folder / "run" / "config.json").is_file()
    assert len(set(ranks.gather(prepared.config.model.vocab_size))) == 1
    try:
        prepare(dataclasses.replace(config, model=dataclasses.replace(config.model, kernels="reference")), ranks, hold)
    except ValueError as error:
        assert "--kernels reference compares on one rank, these are 2" in str(error)
    else:
        raise AssertionError("not refused")
assert ranks.highest(10 if ranks.is_main else 15) == 15
assert dist.all_reduce(torch.zeros(1)) is None
dist.all_reduce = real[0]
assert ranks.mean(torch.tensor([1.0, ranks.rank])).tolist() == [1.0, 0.5]
part(ranks)
print(f"rank {ranks.rank} done", flush=True)
"""


def test_host_work_does_not_depend_on_device_collectives(tmp_path: Path) -> None:
    """A fresh run folder, with all-reduces that return at once: rank 1 never reads what rank 0 has not written."""
    data = write_twelve_products(tmp_path / "data")
    output = run_torchrun(WORKER, str(tmp_path), str(data))
    assert "rank 0 done" in output
    assert "rank 1 done" in output


STANDS_STILL = """
import os, time
from datetime import timedelta
from eclip.parallel import ending
from eclip.parallel.ranks import find_ranks, start_ranks

ranks = start_ranks(find_ranks(timeout=2))
assert ranks.highest(3 + ranks.rank) == 4
began = time.monotonic()
if ranks.is_main:
    try:
        ranks.highest(0)
    except RuntimeError as error:
        assert 1 < time.monotonic() - began < 5
        assert ending._LOST.search(str(error)), error
        print("did not wait for ever", flush=True)
    ranks.watch.store.set("seen", "")
else:
    ranks.watch.store.wait(["seen"], timedelta(seconds=60))  # the store's own limit is that of the vote
ranks.watch.retire()
os._exit(0)
"""


def test_the_vote_waits_for_a_rank_that_stands_still_only_so_long() -> None:
    """Its signs of life go on: they come from a thread."""
    assert "did not wait for ever" in run_torchrun(STANDS_STILL)
