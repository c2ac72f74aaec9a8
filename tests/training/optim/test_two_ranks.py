"""Every optimizer on shards of two ranks takes the steps of one process."""

from pathlib import Path

from tests.helpers import run_torchrun

RANKS = """
import copy, gc, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from eclip.config import OptimConfig
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.parallel.sharding import shard
from eclip.training.checkpoint import load_checkpoint, save_checkpoint
from eclip.training.momentum import update_momentum
from eclip.training.optim import build_optimizer, fresh_state, step_if_finite
from tests.training.optim import apex_stand_in
from tests.training.optim.test_optimizer import NoReads

apex_stand_in.install()
ranks = start_ranks(find_ranks(timeout=60))

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(6)
        self.wide = torch.nn.Linear(6, 7)     # rows that do not divide
        self.flat = torch.nn.Linear(7, 1)     # one row: a rank has none
        self.back = torch.nn.Linear(1, 6)
    def forward(self, x):
        return x + self.back(self.flat(self.wide(self.norm(x)).tanh()))

class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(5, 6)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.unused = torch.nn.Linear(2, 2)
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return (x * self.scale).square().mean()

class Root(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.momentum = Tower(), Tower()
        self.momentum.load_state_dict(self.model.state_dict())
        self.momentum.requires_grad_(False)
    def forward(self, x):
        return self.model(x)

def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

def everything(root, optimizer):
    for m in (root.model, root.momentum):
        yield from (full(p) for p in m.parameters())
    yield from (full(v) for p in root.model.parameters() for v in optimizer.state.get(p, {}).values())

def take(root, optimizer, rows, reads, finite=True):
    root(rows).backward()
    if not finite:
        for p in root.model.parameters():
            if p.grad is not None:
                p.grad.mul_(float("nan"))
    with reads:
        step_if_finite(optimizer, torch.tensor(finite))
        update_momentum(root.model, root.momentum, 0.9, finite=torch.tensor(finite))
    optimizer.zero_grad(set_to_none=True)

def compare(kind, folder):
    config = OptimConfig(optimizer=kind, learning_rate=1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    whole = Root()
    sharded = copy.deepcopy(whole)
    shard(sharded, ranks.mesh)
    reads = NoReads() if kind == "adamw" else nullcontext()
    own = slice(4 * ranks.rank, 4 * ranks.rank + 4)
    pairs = [(whole, build_optimizer(whole.model, config)), (sharded, build_optimizer(sharded.model, config))]
    for seed in range(3):
        for root, optimizer in pairs:
            rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
            rows = rows[own] if root is sharded else rows
            take(root, optimizer, rows, reads)
            before = list(everything(root, optimizer))
            take(root, optimizer, rows, reads, finite=False)
            after = list(everything(root, optimizer))
            assert len(after) == len(before) and all(map(torch.equal, after, before))
        # Muon's iterations are in bfloat16: a last bit of a gradient may become one of bfloat16's. Its steps are 2e-3.
        tolerance = 2e-5 if kind == "muon" else 2e-6
        for a, b in zip(everything(*pairs[1]), everything(*pairs[0]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    # What one rank's part of the state is, and a checkpoint of it.
    for p in sharded.model.parameters():
        for key, value in fresh_state(optimizer, p).items():
            assert key == "step" or (isinstance(value, DTensor) and value.placements == p.placements)
        assert p.grad is None
    path = save_checkpoint(folder, 3, sharded.model, None, optimizer, {}, ranks)
    again = build_optimizer(sharded.model, config)
    load_checkpoint(path, sharded.model, None, again, ranks)
    for p in sharded.model.parameters():
        old, new = optimizer.state.get(p, {}), again.state.get(p, {})
        assert list(old) == list(new) and all(torch.equal(full(old[k]), full(new[k])) for k in old)

for kind in sys.argv[2:]:
    compare(kind, Path(sys.argv[1], kind))
print(f"rank {ranks.rank} done", flush=True)
gc.collect()
part(ranks)
"""


def test_two_ranks_step_as_one_does(tmp_path: Path) -> None:
    """With shards that are uneven or empty; skipped steps, the momentum model and checkpoints among them."""
    output = run_torchrun(RANKS, str(tmp_path), "adamw", "apex_adam", "muon")
    assert "rank 0 done" in output
    assert "rank 1 done" in output
