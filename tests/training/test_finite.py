"""What is said of steps that are not finite, by which rank, and how many are too many."""

import json
import math
from pathlib import Path

import pytest
import torch

from eclip.parallel.ranks import Ranks
from eclip.parallel.watch import PeerFailed
from eclip.training.finite import NonFiniteLoss, SkippedSteps
from eclip.training.flight import Record
from tests.helpers import run_torchrun

NAN = float("nan")
KEYS = [f"p{i}/000.jpg" for i in range(10)]


class _OfThree(Ranks):
    """One of three ranks; what the others would send is given."""

    bad: tuple[bool, ...] = ()

    def gather(self, item: object) -> list:
        assert item == self.bad[self.rank]
        return list(self.bad)


def _ranks(rank: int, bad: tuple[bool, ...] = (False,) * 3) -> Ranks:
    ranks = _OfThree(rank=rank, world_size=3, device=torch.device("cpu"), mesh=None)
    object.__setattr__(ranks, "bad", bad)
    return ranks


def _record(step: int, mean: float = NAN, own: float = 2.0) -> Record:
    """The gradient, and so its norm, is the same on all ranks."""
    means, mine = {"loss": mean, "grad_norm": mean}, {"loss": own, "grad_norm": mean}
    return Record(step, KEYS, 1e-3, means, mine, finite=math.isfinite(mean))


def test_gradients_of_parts_are_norms_in_the_file_and_not_in_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which part's gradient is no number; the message stays one that can be read."""
    means = {"loss": 1.0, "grad_norm": NAN, "grad_square/decoder": 4.0, "grad_square/heads": NAN}
    SkippedSteps(2, tmp_path, _ranks(0)).see(Record(3, KEYS, 1e-3, means, means, finite=False))
    assert "step 3: loss 1, grad_norm nan: skipped" in capsys.readouterr().out
    report = json.loads((tmp_path / "nonfinite_step3_rank0.json").read_text())
    assert report["mean"] == {"loss": 1.0, "grad_norm": "nan", "grad_norm/decoder": 2.0, "grad_norm/heads": "nan"}
    assert report["rank"] == {"loss": 1.0}


def test_counts_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Stops between bad steps do not give a run that has diverged a new allowance each time."""
    before = SkippedSteps(2, tmp_path, _ranks(0))
    for step in range(2):
        before.see(_record(step))
    after = SkippedSteps(2, tmp_path, _ranks(0))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    with pytest.raises(NonFiniteLoss, match="The 3 steps up to it"):
        after.see(_record(2))
    assert after.total == 3
    old = SkippedSteps(2, tmp_path, _ranks(0))
    old.load_state_dict({})
    assert old.total == old.in_a_row == 0


def test_finite_numbers_pass(tmp_path: Path) -> None:
    skipped = SkippedSteps(0, tmp_path, _ranks(0))
    assert skipped.see(_record(7, 1.0))
    assert skipped.total == 0
    assert not list(tmp_path.iterdir())


def test_a_few_are_counted_and_their_images_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = SkippedSteps(2, tmp_path, _ranks(0))
    assert [skipped.see(_record(step, mean)) for step, mean in enumerate([1.0, NAN, float("inf"), 1.0, NAN])] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert skipped.total == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"nonfinite_step{n}_rank0.json" for n in (1, 2, 4)]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert "step 1: loss nan, grad_norm nan: skipped (its images are in" in said[0]
    assert "step 2: loss inf, grad_norm inf: skipped (2 in a row;" in said[1]


@pytest.mark.parametrize(
    "bad, speaks", [((False, True, True), 1), ((True, True, True), 0), ((False, False, True), 2), ((False,) * 3, 0)]
)
@pytest.mark.parametrize("limit", [0, 2])
def test_past_the_limit_the_first_rank_at_fault_speaks_and_all_write(
    bad: tuple[bool, ...], speaks: int, limit: int, tmp_path: Path
) -> None:
    for rank in range(3):
        skipped = SkippedSteps(limit, tmp_path, _ranks(rank, bad))
        for step in range(7 - limit, 7):
            assert not skipped.see(_record(step))
        with pytest.raises(NonFiniteLoss if rank == speaks else PeerFailed) as error:
            skipped.see(_record(7, own=float("inf") if bad[rank] else 2.0))
        if rank == speaks:
            assert f"Images of rank {rank}: p0/000.jpg" in str(error.value)
            assert "step 7: loss nan, grad_norm nan" in str(error.value)
            assert ("the 3 steps up to it" in str(error.value).lower()) == (limit == 2)
            assert "\n" not in str(error.value)
        report = json.loads((tmp_path / f"nonfinite_step7_rank{rank}.json").read_text())
        assert report["keys"] == KEYS
        assert report["mean"] == {"loss": "nan", "grad_norm": "nan"}  # JSON has no NaN
        assert report["rank"]["loss"] == ("inf" if bad[rank] else 2.0)


BAD_RANK = """
import os, sys
from pathlib import Path
from eclip.objectives.eclip import EclipObjective
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.parallel.watch import PeerFailed
from eclip.train import train
from eclip.training.finite import NonFiniteLoss
from tests.training.run_folders import make_config

right = EclipObjective.local_losses
def wrong(self, model, batch, *rest, **options):
    losses = right(self, model, batch, *rest, **options)
    if os.environ["RANK"] == "1" and batch.part == 1 and batch.step in (1, 2):
        losses["itm"] = losses["itm"] * float("nan")
    return losses
EclipObjective.local_losses = wrong

ranks = start_ranks(find_ranks(timeout=120))
config = make_config(Path(sys.argv[1]), Path(sys.argv[2]), steps=4, micro_batch=2, max_nonfinite_steps=1)
try:
    train(config, ranks)
    raise AssertionError("it went on")
except NonFiniteLoss as error:
    assert ranks.rank == 1 and "Images of rank 1" in str(error), error
except PeerFailed as error:
    assert ranks.rank == 0, error
part(ranks)
"""


def test_of_two_ranks_the_one_at_fault_speaks(twelve_products: Path, tmp_path: Path) -> None:
    """One micro-batch of rank 1 makes every rank's gradient NaN, and the losses of rank 1 alone."""
    output = run_torchrun(BAD_RANK, str(twelve_products), str(tmp_path), timeout=240)
    assert output.count("skipped (its images are in") == 1
    reports = [json.loads((tmp_path / f"nonfinite_step2_rank{rank}.json").read_text()) for rank in range(2)]
    assert [report["rank"]["itm"] == "nan" for report in reports] == [False, True]
    assert [report["mean"]["grad_norm"] for report in reports] == ["nan", "nan"]
    assert not set(reports[0]["keys"]) & set(reports[1]["keys"])
