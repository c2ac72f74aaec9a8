"""The whole evaluation on the catalogue of colours: which tables, which files, in which order."""

import errno
import json
import math
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eclip.evaluate.run as run_module
import eclip.evaluate.tasks
from eclip.evaluate.report.sheet import Overlay
from eclip.evaluate.report.tables import Table
from eclip.evaluate.run import TASKS, evaluate_run
from eclip.files import CannotWrite
from tests.evaluate.colours import Catalogue, prepare


def test_whole_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    result = evaluate_run(run, batch_size=5, progress=False)
    tables = {name: table["rows"] for name, table in result["tables"].items()}

    assert set(tables) == {
        "classification_type", "classification_category", "image_text_retrieval", "image_text_retrieval_product",
        "image_text_loss", "product_retrieval", "product_retrieval_unseen_type", "product_retrieval_coarse",
        "product_retrieval_words", "product_retrieval_prompted", "product_retrieval_prompted_other",
        "rerank_words", "rerank_photos", "grounding", "grounding_unseen_type",
    }  # fmt: skip
    assert tables["classification_type"]["instance (image+text)"]["Acc@1"] == 1
    assert tables["classification_type"]["text only"]["Acc@1"] == 1
    assert tables["classification_type"]["chance"]["Acc@1"] == pytest.approx(1 / 6)

    fine = tables["product_retrieval"]
    assert list(fine) == [
        "instance (image)", "global (image)", "instance (image+text)", "instance + text", "global (image+text)",
        "text only", "chance",
    ]  # fmt: skip
    assert list(fine["chance"]) == ["mAP@1", "mAP@5", "mAP@10", "R@1", "R@5", "R@10"]
    assert fine["instance (image+text)"]["mAP@10"] == 1
    # Half of a customer photo's colour is its neighbour's: without a prompt the mixture is found.
    assert fine["global (image)"]["mAP@1"] < 1
    assert fine["chance"]["mAP@1"] == pytest.approx(1 / 6) and fine["chance"]["R@5"] == pytest.approx(5 / 6)
    assert result["tables"]["product_retrieval"]["counts"] == {"queries": 6, "gallery": 6}
    assert result["tables"]["product_retrieval_unseen_type"]["counts"] == {"queries": 1, "gallery": 6}
    assert tables["product_retrieval_coarse"]["chance"]["mAP@1"] == pytest.approx(1 / 2)

    other = tables["product_retrieval_prompted_other"]
    assert result["tables"]["product_retrieval_prompted_other"]["counts"] == {"queries": 6, "gallery": 6}
    assert other["both: instance (title)"]["mAP@1"] == 1 and other["both: instance (title)"]["photo's own R@1"] == 0
    assert tables["product_retrieval_prompted"]["both: instance (title)"]["mAP@1"] == 1
    assert other["chance"]["mAP@1"] == other["chance"]["photo's own R@1"] == pytest.approx(1 / 6)
    assert tables["product_retrieval_words"]["page: instance (title)"]["mAP@1"] == 1
    assert tables["rerank_words"]["head, stored instance"]["mAP@1"] == 1
    assert tables["rerank_photos"]["chance, of these 50"] == pytest.approx(tables["rerank_photos"]["chance"])

    retrieval = tables["image_text_retrieval"]
    assert result["tables"]["image_text_retrieval"]["counts"] == {"images": 18, "texts": 6}
    assert retrieval["global"]["t2i R@1"] == 1 and retrieval["chance"]["i2t R@1"] == pytest.approx(1 / 6)
    assert retrieval["chance"]["t2i R@1"] == pytest.approx(3 / 18)

    loss = tables["image_text_loss"]
    assert list(loss) == ["instance", "global", "chance"]
    assert all(row["nats"] == pytest.approx(math.log(18)) for row in loss.values())  # at the stub's scale, 0

    found = tables["grounding"]
    assert set(found) == {"instance", "global", "centre prior", "random"}
    for question in ("region Acc@0.5", "region Acc@0.7", "ranked Acc@0.7", "which", "point"):
        assert found["instance"][question] == 1, question
    assert found["centre prior"]["region Acc@0.5"] == 0
    assert found["random"]["which"] == pytest.approx(1 / 2)
    assert found["random"]["point"] == pytest.approx(48 * 32 / (128 * 64))
    assert result["tables"]["grounding"]["counts"] == {"images": 12}
    assert set(result["tables"]["grounding"]["settings"]["thresholds"]) == {"instance", "global"}

    assert json.loads((run / "evaluation.json").read_text())["tables"].keys() == result["tables"].keys()
    with Image.open(run / "grounding.png") as sheet:
        assert sheet.width > 400
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 100
    printed = capsys.readouterr().out
    assert "product retrieval, same product (6 queries, 6 gallery)" in printed
    assert re.search(r"one batch \(18 images\)\n +nats\n.*\n.*\nchance +2\.89\n", printed)
    assert "chosen on 12 val images" in printed


def test_clip_run_has_no_instance_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue(), objective="clip")
    result = evaluate_run(run, progress=False)
    assert not result["decoder_trained"]
    for name, table in result["tables"].items():
        assert not [row for row in table["rows"] if row.startswith("instance")], name
        assert not [row for row in table["rows"] if "instance" in row or "head" in row], name
    assert "global" in result["tables"]["grounding"]["rows"]
    assert "both: global + text" in result["tables"]["product_retrieval_prompted_other"]["rows"]
    assert result["skipped"]["rerank_photos"] == "this run trained no matching head"
    assert "instance rows: absent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "trained"),
    [
        ({}, True),
        ({"inter_weight": 0.0, "itm_weight": 0.5, "intra_weight": 0.0}, True),
        ({"inter_weight": 0.0, "itm_weight": 0.0, "intra_weight": 0.0}, False),
        ({"objective": "clip"}, False),
    ],
)
def test_a_decoder_that_no_loss_reached_is_untrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], trained: bool
) -> None:
    result = evaluate_run(prepare(tmp_path, monkeypatch, Catalogue(), Catalogue(), **changed), progress=False)
    assert result["decoder_trained"] is trained
    assert ("instance" in result["tables"]["grounding"]["rows"]) is trained
    assert ("rerank_words" in result["tables"]) is (trained and changed.get("itm_weight", 1.0) > 0)


def test_every_file_of_tasks_is_a_task() -> None:
    files = {module.name for module in pkgutil.iter_modules(eclip.evaluate.tasks.__path__)}
    assert files == {task.__module__.rpartition(".")[2] for task in TASKS} and len(files) == len(TASKS)


def test_a_new_task_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sizes(evaluator: object, split: run_module.Split) -> Iterator[tuple[str, Table | str | list[Overlay]]]:
        rows = {source: {"share": float(np.mean(split.features.sources == source))} for source in ("detail", "ad")}
        yield "sizes", Table(title="images by source", rows=rows, counts={"images": len(split.features)})
        yield "colours", "nobody asked"

    monkeypatch.setattr(run_module, "TASKS", (*TASKS, sizes))
    result = evaluate_run(prepare(tmp_path, monkeypatch, Catalogue(), Catalogue()), progress=False)
    assert list(result["tables"])[-1] == "sizes" and result["skipped"] == {"colours": "nobody asked"}
    printed = capsys.readouterr().out
    assert re.search(r"images by source \(18 images\)\n +share\ndetail +33\.3\n", printed)
    assert "skipped colours: nobody asked" in printed


def test_catalogue_without_boxes_or_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(boxes=False, only_detail=True), None)
    (run / "grounding.png").write_bytes(b"of an evaluation before")
    result = evaluate_run(run, progress=False)
    assert set(result["skipped"]) == {
        "classification_type",
        "product_retrieval",
        "product_retrieval_coarse",
        "product_retrieval_words",
        "product_retrieval_prompted",
        "product_retrieval_prompted_other",
        "rerank_words",
        "rerank_photos",
        "grounding",
    }
    assert "classification_category" in result["tables"] and "image_text_retrieval" in result["tables"]
    assert not (run / "grounding.png").exists()
    assert "skipped grounding: no customer or ad image" in capsys.readouterr().out


def test_limit_takes_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    result = evaluate_run(run, progress=False, limit=2, split="other")
    assert result["products"] == 2 and result["images"] == 6
    assert (run / "evaluation-other.json").is_file() and (run / "grounding-other.png").is_file()
    with pytest.raises(ValueError, match="--limit 0"):
        evaluate_run(run, progress=False, limit=0)
    with pytest.raises(ValueError, match="--threshold 3"):
        evaluate_run(run, progress=False, threshold=3)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_smallest_split_has_no_undefined_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    result = evaluate_run(prepare(tmp_path, monkeypatch, Catalogue(), None), progress=False, limit=limit)
    assert not [name for name, table in result["tables"].items() if "undefined" in table]


def test_candidates_are_decoded_for_as_many_queries_as_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(corrupt=4), Catalogue())
    result = evaluate_run(run, batch_size=5, progress=False, decode_queries=4)
    words, photos = (result["tables"][name] for name in ("rerank_words_decoded", "rerank_photos_decoded"))
    assert words["counts"] == photos["counts"] | {"queries": 4} and photos["counts"]["queries"] in (3, 4)
    # Prompted by the words, a page shows its colour in full where it is that colour.
    assert words["rows"]["head, page prompted by the words"]["mAP@1"] == 1
    assert "cosine, photo prompted by the title + cosine" in photos["rows"]
    none = evaluate_run(run, progress=False, limit=1, decode_queries=1)["tables"]["rerank_photos_decoded"]
    assert none["counts"] == {"queries": 1, "gallery": 1}
    with pytest.raises(ValueError, match="--decode-queries -1"):
        evaluate_run(run, progress=False, decode_queries=-1)
    without = evaluate_run(
        prepare(tmp_path, monkeypatch, Catalogue(), Catalogue(), objective="clip"), progress=False, decode_queries=1
    )
    assert without["skipped"]["rerank_words_decoded"] == "this run trained no matching head"


def test_missing_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run here \(config.json is missing\)"):
        evaluate_run(tmp_path / "nowhere")


def test_tables_are_printed_before_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    evaluate_run(run, progress=False)
    before = (run / "evaluation.json").read_bytes()
    capsys.readouterr()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"evaluation.json: cannot be written \(No space left on device"):
        evaluate_run(run, progress=False, threshold=0.2)
    assert "product retrieval, same product" in capsys.readouterr().out
    assert (run / "evaluation.json").read_bytes() == before
    assert not list(run.glob("*.partial"))


def test_a_reader_of_the_tables_that_leaves_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())

    def gone(*arguments: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(run_module, "_print_tables", gone)
    with pytest.raises(BrokenPipeError):
        evaluate_run(run, progress=False)
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["tables"]
