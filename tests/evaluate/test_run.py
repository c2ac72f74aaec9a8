"""The whole evaluation on a made-up catalogue of coloured squares and a model that knows colours.

The stub model has ECLIP's methods; its embeddings are colours, so that what each row must score is known.
"""

import functools
import io
import json
import math
import operator
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eclip.evaluate.inputs as inputs_module
import eclip.evaluate.run as run_module
from eclip.config import DataConfig, RunConfig
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.schema import SOURCES, ImageRecord, Instance, Product
from eclip.evaluate.features import decoder_is_trained
from eclip.evaluate.run import evaluate_run
from eclip.model.settings import ModelConfig
from eclip.objectives.settings import ObjectiveConfig

SIZE, PATCH = 64, 8
COLOURS = {
    "red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255),
}  # fmt: skip
WARM = ("red", "yellow", "magenta")
NAMES = list(COLOURS)


def direction(name: str) -> torch.Tensor:
    return torch.tensor(COLOURS[name]).float() / 127.5 - 1


class Catalogue:
    """Six products, one colour each, three images: the surface of a ShardIndex. Images are stored at 128 x 64."""

    def __init__(self, *, boxes: bool = True, corrupt: int | None = None, only_detail: bool = False) -> None:
        self.products, self.files = [], []
        for p, name in enumerate(NAMES):
            other = NAMES[(p + 1) % len(NAMES)]
            category = "warm" if name in WARM else "cold"
            records = []
            for i, source in enumerate(SOURCES):
                picture = np.full((64, 128, 3), 127, np.uint8)
                own = (16, 8, 112, 56) if source == "detail" else (64, 16, 112, 48)
                seen = [(name, own)] if source == "detail" else [(name, own), (other, (0, 0, 48, 64))]
                for colour, (x0, y0, x1, y1) in seen:
                    picture[y0:y1, x0:x1] = COLOURS[colour]
                stream = io.BytesIO()
                Image.fromarray(picture).save(stream, "JPEG", quality=95, subsampling=0)
                self.files.append(stream.getvalue())
                found = tuple(Instance(product=n, sku=n, box=b) for n, b in seen)
                records.append(
                    ImageRecord(
                        file=f"{i:03d}.jpg", source="detail" if only_detail else source, title=f"{name} {category}",
                        width=128, height=64, instances=found if boxes else (),
                    )
                )  # fmt: skip
            attributes = {"type": name, "unseen_type": p == 0} if boxes else {}
            self.products.append(
                Product(
                    key=name, product=name, title=name, category=category, attributes=attributes, images=tuple(records)
                )
            )
        if corrupt is not None:
            self.files[corrupt] = b"no picture"
        self.num_products, self.num_images = len(self.products), len(self.files)
        self.fingerprint = "0123456789abcdef"
        self.image_start = np.arange(0, self.num_images + 1, 3)
        records = [r for product in self.products for r in product.images]
        self.image_source = np.array([SOURCES.index(r.source) for r in records], np.uint8)
        self.titles = [r.title for r in records]
        self.title_ids = np.array([self.titles.index(t) for t in self.titles])
        self.categories = ["cold", "warm"]
        self.category_ids = np.array([self.categories.index(product.category) for product in self.products])

    def title(self, row: int) -> str:
        return self.titles[row]

    def image_key(self, row: int) -> str:
        return f"{NAMES[row // 3]}/{row % 3:03d}.jpg"

    def read_image(self, row: int) -> bytes:
        return self.files[row]

    def product(self, p: int) -> Product:
        return self.products[p]


class Words:
    """A tokenizer of colour words; other words, and category names, vanish."""

    def encode(self, texts: list[str], max_tokens: int = 55) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = [[NAMES.index(w) for w in text.split() if w in COLOURS] for text in texts]
        lengths = torch.tensor([0] + [len(t) for t in tokens])
        return torch.tensor(functools.reduce(operator.iadd, tokens, []), dtype=torch.int64), lengths.cumsum(0).int()


class Colours(torch.nn.Module):
    """Features are colours; the decoder shares patches out between the prompt, its opposite and nothing."""

    def scale(self) -> torch.Tensor:
        return torch.tensor(0.0)

    def image_tower(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, SIZE, SIZE)
        patches = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, PATCH).flatten(2).mT
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)

    def project_image(self, tower: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(cls=tower[:, 0], tokens=tower[:, 1:])

    def encode_text(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        table = torch.stack([direction(name) for name in NAMES])
        ends = cu_seqlens.tolist()
        return torch.stack([table[tokens[a:b]].sum(0) for a, b in zip(ends, ends[1:], strict=False)])

    def instance_queries(self, prompt: torch.Tensor, modality: int) -> torch.Tensor:
        return torch.stack([prompt, -prompt, torch.zeros_like(prompt)], dim=1)

    def decode_queries(
        self, tokens: torch.Tensor, queries: torch.Tensor, *, return_map: bool = False
    ) -> SimpleNamespace:
        logits = torch.einsum("btd,bnd->btn", queries, tokens)
        logits[:, 0] -= 2  # a colour's product with itself is 3, with its neighbours on the cube 1
        assignment = (8 * logits).softmax(1)
        weights = assignment / assignment.sum(-1, keepdim=True)
        return SimpleNamespace(slots=weights @ tokens, assignment=assignment)


def prepare(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    test: Catalogue,
    val: Catalogue | None,
    *,
    locked: bool = False,
    **objective: object,
) -> Path:
    config = RunConfig(
        lock_image=locked, cache_features=locked,
        model=ModelConfig(image_size=SIZE, patch_size=PATCH), data=DataConfig(data_dir=tmp_path),
        objective=ObjectiveConfig(**objective),  # type: ignore[arg-type]
    )  # fmt: skip
    (tmp_path / "config.json").write_text(config.to_json())

    def open_split(data_dir: Path, split: str) -> Catalogue:
        if split == "val" and val is None:
            raise ValueError("no val-000000.tar")
        return val if split == "val" else test

    monkeypatch.setattr(run_module, "load_run", lambda run_dir, device: (Colours(), config, Words()))
    monkeypatch.setattr(inputs_module, "ShardIndex", SimpleNamespace(open=open_split))
    return tmp_path


def test_whole_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    result = evaluate_run(run, batch_size=5, progress=False)
    tables = {name: table["rows"] for name, table in result["tables"].items()}

    assert set(tables) == {
        "classification_type", "classification_category", "image_text_retrieval", "image_text_retrieval_product",
        "image_text_loss", "product_retrieval", "product_retrieval_unseen_type", "product_retrieval_coarse",
        "grounding", "grounding_unseen_type",
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
    assert "global" in result["tables"]["grounding"]["rows"]
    assert "instance rows: absent" in capsys.readouterr().out


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
        "grounding",
    }
    assert "classification_category" in result["tables"] and "image_text_retrieval" in result["tables"]
    assert not (run / "grounding.png").exists()
    assert "skipped grounding: no customer or ad image" in capsys.readouterr().out


def test_without_val_split_the_threshold_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), None)
    table = evaluate_run(run, progress=False)["tables"]["grounding"]
    assert table["settings"]["thresholds"] == {"instance": 0.5, "global": 0.5} and "no val split" in table["note"]


def test_corrupt_image_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(corrupt=4), Catalogue())
    result = evaluate_run(run, batch_size=1, progress=False, threshold=0.4)
    assert result["images"] == 17 and len(result["corrupt"]) == 1
    assert "lime/001.jpg" in capsys.readouterr().out
    assert result["tables"]["product_retrieval"]["counts"]["queries"] == 5
    assert result["tables"]["grounding"]["settings"]["thresholds"]["instance"] == 0.4


def test_limit_takes_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue())
    result = evaluate_run(run, progress=False, limit=2, split="other")
    assert result["products"] == 2 and result["images"] == 6
    assert (run / "evaluation-other.json").is_file() and (run / "grounding-other.png").is_file()
    with pytest.raises(ValueError, match="--limit 0"):
        evaluate_run(run, progress=False, limit=0)
    with pytest.raises(ValueError, match="--threshold 3"):
        evaluate_run(run, progress=False, threshold=3)


def test_images_without_a_record_are_no_grounding_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue()
    catalogue.products = [replace(p, images=p.images[:2]) for p in catalogue.products]
    run = prepare(tmp_path, monkeypatch, catalogue, Catalogue())
    assert evaluate_run(run, progress=False)["tables"]["grounding"]["counts"] == {"images": 6}


def test_cached_tower_outputs_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Cache:
        @classmethod
        def build_or_open(cls, cache_dir: Path, model: Colours, index: Catalogue, *rest: object, **options: object):
            asked.append(cache_dir)
            images = torch.stack([decode_square(index.read_image(row), SIZE) for row in range(index.num_images)])
            outputs = model.image_tower(images)
            return SimpleNamespace(tower_outputs=lambda rows: outputs[torch.from_numpy(rows)], undecodable={})

    direct = evaluate_run(prepare(tmp_path, monkeypatch, Catalogue(), Catalogue()), progress=False)
    run = prepare(tmp_path, monkeypatch, Catalogue(), Catalogue(), locked=True)
    monkeypatch.setattr(run_module, "FeatureCache", Cache)
    cached = evaluate_run(run, batch_size=4, progress=False)
    assert asked == [tmp_path / "features"] * 2
    assert cached["tables"] == direct["tables"]


def test_a_decoder_that_no_loss_reached_is_untrained() -> None:
    weights = {"inter_weight": 0.0, "itm_weight": 0.0, "intra_weight": 0.0}
    assert decoder_is_trained(RunConfig())
    assert decoder_is_trained(RunConfig(objective=ObjectiveConfig(**(weights | {"itm_weight": 0.5}))))
    assert not decoder_is_trained(RunConfig(objective=ObjectiveConfig(**weights)))
    assert not decoder_is_trained(RunConfig(objective=ObjectiveConfig(objective="clip")))


def test_missing_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run here \(config.json is missing\)"):
        evaluate_run(tmp_path / "nowhere")
