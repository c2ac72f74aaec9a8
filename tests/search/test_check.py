"""What the index finds is what evaluation finds."""

from pathlib import Path

import pytest

from eclip.evaluate.run import evaluate_run
from eclip.inference import TrainedModel
from eclip.search import check
from tests.search.conftest import make_index
from tests.training.run_folders import copy_run


def test_a_flat_index_has_the_scores_of_the_evaluation(
    trained: Path, eclip_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(trained, tmp_path / "run")
    told = evaluate_run(run, progress=False)["tables"]["product_retrieval"]["rows"]
    index = make_index(eclip_model, trained.parent / "data", tmp_path / "index")
    found = check.check(check.ImageTable.open(index), "test")
    assert set(found) == set(check.ROWS)
    for column, (checked, queries, gallery) in found.items():
        assert checked.same == queries and checked.recall == 1 and gallery > 0
        assert checked.scores == pytest.approx(told[check.ROWS[column]], abs=1e-9)
    capsys.readouterr()
    check.main(["--index", str(index), "--checkpoint", str(run), "--queries", "3"])
    said = capsys.readouterr().out
    assert "instance (image), evaluation" in said and "3 of 3 queries" in said


def test_what_cannot_be_compared(shop: Path, tmp_path: Path) -> None:
    for flags, said in (
        (["--split", "nowhere"], "no customer photos"),
        (["--checkpoint", str(tmp_path)], "no evaluation.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            check.main(["--index", str(shop), *flags])
        assert said in str(stop.value)
