"""What is said of a loss that is not finite, and by which rank."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from eclip.dataloading.schema import Batch
from eclip.parallel.ranks import Ranks
from eclip.parallel.watch import PeerFailed
from eclip.training.finite import NonFiniteLoss, require_finite

NAN = float("nan")


class _OfThree(Ranks):
    """One of three ranks; what the others would send is given."""

    bad: tuple[bool, ...] = ()

    def gather(self, item: object) -> list:
        assert item == self.bad[self.rank]
        return list(self.bad)


def _ranks(rank: int, bad: tuple[bool, ...]) -> Ranks:
    ranks = _OfThree(rank=rank, world_size=3, device=torch.device("cpu"), mesh=None)
    object.__setattr__(ranks, "bad", bad)
    return ranks


@pytest.fixture
def batch() -> Batch:
    fields = {field.name: None for field in dataclasses.fields(Batch)}
    return Batch(**{**fields, "keys": [f"p{i}/000.jpg" for i in range(10)], "step": 7})


def test_finite_numbers_pass(batch: Batch, tmp_path: Path) -> None:
    require_finite({"loss": 1.0}, {"loss": torch.tensor(1.0)}, batch, tmp_path, _ranks(0, (False,) * 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad, speaks", [((False, True, True), 1), ((True, True, True), 0), ((False, False, True), 2), ((False,) * 3, 0)]
)
def test_the_first_rank_at_fault_speaks_and_all_write(
    bad: tuple[bool, ...], speaks: int, batch: Batch, tmp_path: Path
) -> None:
    for rank in range(3):
        losses = {"loss": torch.tensor(float("inf") if bad[rank] else 2.0)}
        with pytest.raises(NonFiniteLoss if rank == speaks else PeerFailed) as error:
            require_finite({"loss": NAN, "grad_norm": NAN}, losses, batch, tmp_path, _ranks(rank, bad))
        if rank == speaks:
            assert f"Images of rank {rank}: p0/000.jpg" in str(error.value)
            assert "step 7: loss nan, grad_norm nan" in str(error.value)
        report = json.loads((tmp_path / f"nonfinite_step7_rank{rank}.json").read_text())
        assert len(report["keys"]) == 10
        assert report["mean"] == {"loss": "nan", "grad_norm": "nan"}  # JSON has no NaN
        assert report["rank"] == {"loss": "inf" if bad[rank] else 2.0}
