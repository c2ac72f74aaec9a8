"""A sharded model gives the gradients of the whole one; blocks are sharded apart from the rest."""

from tests.helpers import run_torchrun

RANKS = """
import gc
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.parallel.sharding import shard

class Root(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.last = torch.nn.Linear(4, 1)
    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return self.last(x).mean()

ranks = start_ranks(find_ranks(timeout=60))
torch.manual_seed(0)
whole, sharded = Root(), Root()
sharded.load_state_dict(whole.state_dict())
rows = torch.randn(4, 4)
whole(rows).backward()
shard(sharded, ranks.mesh)
assert all(isinstance(module, FSDPModule) for module in (sharded, *sharded.blocks))
assert not isinstance(sharded.last, FSDPModule)
sharded(rows[2 * ranks.rank : 2 * ranks.rank + 2]).backward()
for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
    assert isinstance(b, DTensor), name
    torch.testing.assert_close(b.grad.full_tensor(), a.grad, msg=name)
del sharded, a, b
gc.collect()
part(ranks)
print(f"rank {ranks.rank} done", flush=True)
"""


def test_two_ranks_have_the_gradients_of_one() -> None:
    output = run_torchrun(RANKS)
    assert "rank 0 done" in output
    assert "rank 1 done" in output
