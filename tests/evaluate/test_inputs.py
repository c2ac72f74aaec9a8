"""What an evaluation is given: wrong numbers and devices, and a catalogue that is missing, moved or another one."""

import json
import math
from pathlib import Path

import pytest
import torch

from eclip.config import DataConfig, RunConfig
from eclip.dataloading.shards import ShardIndex
from eclip.evaluate.inputs import Catalogue, NoSplit, OtherData, check_numbers, choose_device
from tests.dataloading.fixtures import jpeg, make_split


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, None, "auto"), "--batch-size 0: take at least one"),
        ((-3, None, "auto"), "--batch-size -3"),
        ((1, 0, "auto"), "--limit 0: evaluate at least one product"),
        ((1, -1, "auto"), "--limit -1"),
        ((1, None, 2.0), r"--threshold 2.0: the score maps lie in \[0, 1\]"),
        ((1, None, math.nan), "--threshold nan"),
        ((1, None, math.inf), "--threshold inf"),
        ((1, None, 0.0), "--threshold 0.0"),
    ],
)
def test_numbers_that_mean_nothing(numbers: tuple[int, int | None, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_numbers(*numbers)
    check_numbers(1, 1, 0.5)
    check_numbers(64, None, "auto")


@pytest.mark.parametrize(
    "name",
    [
        "tpu",
        "",
        "cpu:banana",
        "cpu:1",
        "cpu:",
        "cuda:",
        "cuda:-1",
        "cuda:99",
        "cuda:x",
        "cuda:²",
        "mps",
        "meta",
        "xla",
        "0",
    ],
)
def test_devices_that_are_not_there_are_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"^--device {name}: ") as refusal:
        choose_device(name)
    assert "\n" not in str(refusal.value)


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == choose_device("cpu:0") == choose_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: torch .* finds no GPU here; use --device cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device("auto").type == "cuda" and choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:2: the last GPU here is cuda:1"):
        choose_device("cuda:2")


def shop(folder: Path, offset: int = 0, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    for split in splits:
        make_split(folder, split, products=2, images=1, tars=1, image=lambda p, i: jpeg(p + offset, width=40 + offset))
    return folder


def a_run(folder: Path, data_dir: Path | str, *, record: bool = True) -> tuple[Path, RunConfig]:
    folder.mkdir()
    if record:
        prints = {split: ShardIndex.open(Path(data_dir), split).fingerprint for split in ("train", "val", "test")}
        (folder / "data.json").write_text(json.dumps({"data_dir": str(data_dir), "fingerprints": prints}))
    return folder, RunConfig(data=DataConfig(data_dir=Path(data_dir)))


def test_the_runs_own_data_needs_no_flag_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = a_run(tmp_path / "run", shop(tmp_path / "shop"))
    decoy = tmp_path / "elsewhere"
    shop(decoy / "shop", 7)
    monkeypatch.chdir(decoy)
    for kept in (config, RunConfig(data=DataConfig(data_dir=Path("shop")))):
        found = Catalogue.of_run(run, kept, None)
        assert found.folder == tmp_path / "shop" and found.open("test").num_products == 2 and found.notes == []


def test_a_run_without_a_record_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop(tmp_path / "shop")
    run, config = a_run(tmp_path / "run", "shop", record=False)
    monkeypatch.chdir(tmp_path)
    found = Catalogue.of_run(run, config, None)
    assert found.notes == [
        f"the run names its catalogue only as shop: taken from the current directory, {tmp_path / 'shop'}"
    ]
    assert found.open("test").num_products == 2


@pytest.mark.parametrize("split", ["test", "val"])
def test_other_data_at_the_same_place_is_refused_with_a_way_out(tmp_path: Path, split: str) -> None:
    run, config = a_run(tmp_path / "run", shop(tmp_path / "shop"))
    shop(tmp_path / "shop", 7, (split,))
    found = Catalogue.of_run(run, config, None)
    with pytest.raises(OtherData, match=f"its {split} split is not the one .* give --data-dir {tmp_path / 'shop'}"):
        found.open(split)
    assert found.open("train").split == "train"
    chosen = Catalogue.of_run(run, config, tmp_path / "shop")
    assert chosen.open(split).num_products == chosen.open(split).num_products == 2
    assert chosen.notes == [f"--data-dir {tmp_path / 'shop'}: its {split} split is not the one of the run"]


def test_a_moved_catalogue_is_the_runs_own(tmp_path: Path) -> None:
    run, config = a_run(tmp_path / "run", shop(tmp_path / "shop"))
    (tmp_path / "shop").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"shop: no such folder, where .*run has its catalogue; say .* --data-dir"):
        Catalogue.of_run(run, config, None)
    with pytest.raises(ValueError, match="nowhere: no such folder; say where it is with --data-dir"):
        Catalogue.of_run(run, config, tmp_path / "nowhere")
    moved = Catalogue.of_run(run, config, tmp_path / "moved")
    assert moved.open("test").num_products == 2 and moved.notes == []


def test_another_split_than_recorded_is_said(tmp_path: Path) -> None:
    run, config = a_run(tmp_path / "run", shop(tmp_path / "shop"))
    shop(tmp_path / "shop", 3, ("extra",))
    assert Catalogue.of_run(run, config, None).open("extra").num_products == 2
    chosen = Catalogue.of_run(run, config, tmp_path / "shop")
    chosen.open("extra")
    assert "cannot be compared with the run's" in chosen.notes[0]


@pytest.mark.parametrize("split", ["nope", "", "*", "../shop/test", "tes", "test-000000"])
def test_splits_that_are_not_there(tmp_path: Path, split: str) -> None:
    run, config = a_run(tmp_path / "run", shop(tmp_path / "shop"))
    with pytest.raises(NoSplit, match="holds test, train, val; take one of these"):
        Catalogue.of_run(run, config, None).open(split)


def test_a_folder_without_shards_says_so(tmp_path: Path) -> None:
    run, config = a_run(tmp_path / "run", shop(tmp_path / "shop"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoSplit, match="empty: no test-000000.tar"):
        Catalogue.of_run(run, config, tmp_path / "empty").open("test")
