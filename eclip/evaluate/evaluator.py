"""What every task is given: a loaded run and how to run it, and one split with its features; and what it answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from eclip.config import RunConfig
from eclip.dataloading.schema import ImageRecord, Product
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from eclip.evaluate.extraction import encode_batches, extract_features
from eclip.evaluate.extras import NOTHING, Extras, choose_extras, image_record, product_positions
from eclip.evaluate.features import Features
from eclip.evaluate.inputs import Catalogue
from eclip.evaluate.prompting import trains_head
from eclip.evaluate.report.sheet import Overlay
from eclip.evaluate.report.tables import Table
from eclip.model.eclip import ECLIP
from eclip.parallel.ranks import ALONE, Ranks
from eclip.training.feature_cache.cache import FeatureCache
from eclip.training.feature_cache.file import CannotStore

Outcome = Table | str | list[Overlay]
"""Numbers, the reason why there are none, or pictures for the sheet."""


@dataclass(kw_only=True)
class Split:
    """One split, the same for all tasks. n images: those that could be decoded."""

    name: str
    index: ShardIndex
    features: Features
    corrupt: list[str]
    """One "key: reason" for each image that could not be decoded."""
    facts: dict[int, Product]
    """The products of these images by their positions in the index."""

    def products(self) -> list[Product]:
        """(n,) the product of each image."""
        return [self.facts[int(p)] for p in self.features.products]

    def records(self) -> list[ImageRecord]:
        """(n,) what is known of each image; the images without a record come last in their product."""
        places = zip(self.features.rows, self.features.products, self.products(), strict=True)
        return [image_record(self.index, product, int(position), int(row)) for row, position, product in places]

    def unseen_type(self) -> NDArray[np.bool_]:
        """(n,) whether training saw no product of this head noun, where the catalogue says so."""
        return np.array([bool(product.attributes.get("unseen_type")) for product in self.products()])


@dataclass(frozen=True)
class Wanted:
    """What rank 0 asks the others to encode with it."""

    split: str
    rows: NDArray[np.int64]
    batch_size: int
    extras: Extras


@dataclass(kw_only=True)
class Evaluator:
    """A loaded model and how to run it."""

    model: ECLIP
    config: RunConfig
    tokenizer: Tokenizer
    catalogue: Catalogue
    device: torch.device
    batch_size: int = 64
    threshold: float | Literal["auto"] = "auto"
    """Cuts the score maps into regions; "auto" takes the best of a small grid on the VAL split."""
    cache_dir: Path | None = None
    """With a locked image tower: read its outputs from, or first write them to, this folder (float16)."""
    cache_is_wanted: bool = False
    """The user named cache_dir: it is an error when it cannot be written, else the outputs are computed each time."""
    decode_queries: int = 0
    """So many queries have their candidates decoded one by one (tasks/reranking.py)."""
    progress: bool = True
    ranks: Ranks = ALONE
    """Rank 0, and the others that help it (together.py)."""

    def split(self, name: str, index: ShardIndex, limit: int | None) -> Split:
        """Compute the features of an opened split, or of `limit` of its products; tell which images are left out."""
        rows = choose_rows(index, limit)
        known = {int(p): index.product(int(p)) for p in np.unique(product_positions(index, rows))}
        sample = self.decode_queries if trains_head(self.config.objective) else 0
        extras = choose_extras(index, rows, known, sample=sample)
        features, corrupt = self.features(index, rows, f"{name} features", extras)
        for line in corrupt:
            print(f"left out, not decodable: {line}")
        facts = {int(p): known[int(p)] for p in np.unique(features.products)}
        return Split(name=name, index=index, features=features, corrupt=corrupt, facts=facts)

    def features(
        self, index: ShardIndex, rows: NDArray[np.int64], label: str, extras: Extras = NOTHING
    ) -> tuple[Features, list[str]]:
        """`extract_features` of these rows, from the cache where there is one."""
        if self.ranks.world_size > 1:
            self.ranks.from_main(lambda: Wanted(index.split, rows, self.batch_size, extras))
        return extract_features(
            self.model,
            index,
            self.tokenizer,
            self.config,
            rows,
            device=self.device,
            batch_size=self.batch_size,
            cache=self._open_cache(index),
            progress=self.progress,
            label=label,
            extras=extras,
            ranks=self.ranks,
        )

    def help(self, wanted: Wanted) -> None:
        """A rank's share of `features`, called on rank 0."""
        index = self.catalogue.open(wanted.split)
        encode_batches(
            self.model,
            index,
            self.tokenizer,
            self.config,
            wanted.rows,
            device=self.device,
            batch_size=wanted.batch_size,
            cache=self._open_cache(index),
            progress=False,
            label="",
            extras=wanted.extras,
            ranks=self.ranks,
        )

    def _open_cache(self, index: ShardIndex) -> FeatureCache | None:
        if self.cache_dir is None or not self.config.lock_image:
            return None
        try:
            return FeatureCache.build_or_open(
                self.cache_dir,
                self.model,
                index,
                self.tokenizer,
                self.config,
                device=self.device,
                progress=self.progress,
            )
        except CannotStore as error:
            if self.cache_is_wanted:
                raise
            print(f"not cached, computed for this evaluation alone: {error}")
            return None


def choose_rows(index: ShardIndex, limit: int | None) -> NDArray[np.int64]:
    """All images, or those of `limit` products spread evenly over the split."""
    count = index.num_products if limit is None else min(limit, index.num_products)
    products = np.unique(np.linspace(0, index.num_products - 1, count).round().astype(np.int64))
    starts = index.image_start
    return np.concatenate([np.arange(starts[p], starts[p + 1]) for p in products]).astype(np.int64)
