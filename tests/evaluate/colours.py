"""A made-up catalogue of coloured squares and a model that knows colours, for evaluations whose answers are known.

The stub model has ECLIP's methods; its embeddings are colours, so that what each row must score is known.
"""

import functools
import io
import operator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eclip.evaluate.inputs as inputs_module
import eclip.evaluate.run as run_module
from eclip.config import DataConfig, RunConfig
from eclip.dataloading.schema import SOURCES, ImageRecord, Instance, Product
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

    def match(self, features: torch.Tensor) -> torch.Tensor:
        """Odds that are the cosine's order."""
        return torch.stack([torch.zeros(len(features)), features.sum(-1)], dim=-1)

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

    monkeypatch.setattr(run_module, "load_run", lambda run_dir, device, **which: (Colours(), config, Words()))
    monkeypatch.setattr(inputs_module, "ShardIndex", SimpleNamespace(open=open_split))
    return tmp_path
