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
    means, mine = {"loss": mean, "grad_norm": mean}, {"loss": own, "grad_norm": own}
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
    assert report["rank"] == {"loss": 1.0, "grad_norm": "nan"}


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
