"""The README's table is made of the runs' own evaluation.json files, and complete runs are not repeated."""

import json
from pathlib import Path

import pytest

from benchmarks.ablation import BASELINES, METRICS, OBJECTIVES, Arguments, collect, main, train_run
from eclip.presets import parse


def _write(path: Path, value: float, *, decoder: bool) -> Path:
    tables: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for task, metric, rows in METRICS.values():
        found = tables.setdefault(task, {"rows": {}})["rows"]
        for kind, row in rows.items():
            if decoder or kind == "global":
                found.setdefault(row, {})[metric] = value
        for row in (*BASELINES[task], "text only"):
            found.setdefault(row, {})[metric] = 0.03
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tables": tables}))
    return path


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    both = [_write(tmp_path / f"b{i}.json", value, decoder=True) for i, value in enumerate((0.3, 0.4, 0.5))]
    none = [_write(tmp_path / f"n{i}.json", 0.2, decoder=False) for i in range(3)]
    lines = collect({"none (CLIP)": none, "both (ECLIP)": both})
    assert lines[0] == "| | none (CLIP) | both (ECLIP) | without training |"
    assert "| product mAP@1, image: instance | - | 40.0 ± 10.0 | chance 3.0 |" in lines
    assert "| product mAP@1, image: global | 20.0 ± 0.0 | 40.0 ± 10.0 | chance 3.0 |" in lines
    assert len({line.count("|") for line in lines}) == 1, "every line has the same columns"


def test_complete_runs_are_read_and_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in OBJECTIVES:
        for seed in (0, 1):
            _write(tmp_path / f"{name.split()[0]}_{seed}" / "evaluation.json", 0.25, decoder=name != "none (CLIP)")
    main(Arguments(seeds=2, out=tmp_path))
    page = (tmp_path / "ablation.md").read_text()
    assert "25.0 ± 0.0" in page
    assert page in capsys.readouterr().out


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_flags_are_those_of_the_trainer(objective: str) -> None:
    weights = parse(["--preset", "debug", *OBJECTIVES[objective]]).objective
    assert (weights.objective == "clip") == (objective == "none (CLIP)")
    if objective == "inter":
        assert weights.intra_weight == 0 < weights.inter_weight
    if objective == "intra":
        assert weights.inter_weight == weights.itm_weight == 0 < weights.intra_weight


def test_a_failed_run_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"intra, seed 3.*log\.txt"):
        train_run(tmp_path / "x", "intra", 3, Arguments(preset="no_such_preset"))
