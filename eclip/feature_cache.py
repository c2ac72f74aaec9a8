"""Outputs of locked towers, computed once and read from memory maps.

A tower that does not train gives the same features in every epoch. The cache holds, for every image of a split, V views
(view 0: the whole image; views 1..V-1: random resized crops, half of them flipped) as float16 (I, V, 1+N, width), and
for every image's title its pooled float16 text feature (I, text width). Its file names carry a fingerprint of the
shards, the tower's weights and the settings: another tower or another catalogue never reads stale features, and runs on
one catalogue share it. An undecodable image is named, and features of another image of its product stand in its place.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eclip.config import RunConfig
from eclip.dataloading.lock import alone
from eclip.dataloading.pipeline import CorruptImageError, decode_crop, decode_square, open_image
from eclip.dataloading.sampling import hash64, random_crop
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import WordPiece
from eclip.model.eclip import ECLIP
from eclip.objectives import CachedFeatures

log = logging.getLogger(__name__)

_CROP_SEED = 0  # not the run's: runs of other seeds choose among the same views
_STREAM_VIEW = 1000  # keeps the choice of views apart from the sampler's draws


def cache_folder(config: RunConfig) -> Path:
    """Where a run's cache lies: beside the shards, so that runs on one catalogue share it."""
    return config.data.data_dir / "features"


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Digest of a module's parameters and buffers, names and bits."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cached(path: Path, shape: tuple[int, ...], fill: Callable[[np.memmap], None]) -> np.memmap:
    """Map `path`, filled first when absent: by one process, the others wait.

    Written under another name and renamed: a killed run leaves no half.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_suffix(".lock")):
            if not path.exists():  # another run may have filled it while this one waited
                _fill_new(path, shape, fill)
    return np.load(path, mmap_mode="r")


def _fill_new(path: Path, shape: tuple[int, ...], fill: Callable[[np.memmap], None]) -> None:
    partial = path.with_suffix(".partial")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    fill(array)
    array.flush()
    del array
    partial.rename(path)


def _fast_tower(tower: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A bfloat16 copy of a tower where the chip multiplies bfloat16 natively, else the tower.

    Twice as fast on a CPU with AVX512-BF16 (ViT-S/14, 168 px), where autocast casts every weight again in every batch.
    """
    avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # not a public name
    native = device.type == "cuda" or bool(avx512_bf16())
    return copy.deepcopy(tower).to(device, torch.bfloat16).eval() if native else tower


class FeatureCache:
    """Features of one split, looked up by image row. Build on one rank, then open on all."""

    def __init__(self, images: np.ndarray | None, texts: np.ndarray | None) -> None:
        self.images, self.texts = images, texts

    @classmethod
    def build_or_open(
        cls,
        cache_dir: Path,
        model: ECLIP,
        index: ShardIndex,
        tokenizer: WordPiece,
        config: RunConfig,
        *,
        views: int = 1,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> "FeatureCache":
        """Open the cache of the locked towers of `config`; compute what is missing, with a progress bar."""
        device = torch.device(device)
        images = texts = None
        if config.lock_image:
            images = _image_features(Path(cache_dir), model, index, config, views, device, progress)
        if config.lock_text:
            texts = _text_features(Path(cache_dir), model, index, tokenizer, config, device, progress)
        return cls(images, texts)

    def lookup(self, rows: Tensor, *, step: int, seed: int) -> CachedFeatures:
        """rows (B, 2) -> CachedFeatures. The view of an image is a function of (seed, step, row) alone."""
        wanted = rows.cpu().numpy()
        images = None
        if self.images is not None:
            view = hash64(seed, _STREAM_VIEW, step, wanted) % np.uint64(self.images.shape[1])
            images = torch.from_numpy(self.images[wanted, view.astype(np.int64)]).float().to(rows.device)
        texts = None
        if self.texts is not None:
            texts = torch.from_numpy(self.texts[wanted]).float().to(rows.device)
        return CachedFeatures(images, texts)

    def tower_outputs(self, rows: np.ndarray) -> Tensor:
        """View 0 (the whole image) of each row: (n, 1+N, width) float32, for evaluation."""
        assert self.images is not None, "this cache holds no image features"
        return torch.from_numpy(self.images[rows, 0]).float()


def _image_features(
    cache_dir: Path,
    model: ECLIP,
    index: ShardIndex,
    config: RunConfig,
    views: int,
    device: torch.device,
    progress: bool,
) -> np.ndarray:
    size, crop_scale, flip = config.model.image_size, config.data.crop_scale, config.data.flip
    settings = [index.fingerprint, weights_fingerprint(model.image_encoder), size, views]
    settings += [crop_scale, flip, _CROP_SEED] if views > 1 else []
    name = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    shape = (index.num_images, views, 1 + config.model.grid**2, config.model.vision_width)

    def load(row: int, view: int) -> Tensor:
        data = index.read_image(row)
        if view == 0:
            return decode_square(data, size)
        draws = np.random.Generator(np.random.Philox(key=[_CROP_SEED, row * views + view])).random(5)
        box = random_crop(draws[:4], *open_image(data).size, crop_scale)
        return torch.from_numpy(decode_crop(data, size, box, flip=bool(flip and draws[4] < 0.5)).copy())

    def load_or_substitute(item: int) -> Tensor:
        row, view = divmod(item, views)
        product = index.product_of(row)
        siblings = range(index.image_start[product], index.image_start[product + 1])
        for candidate in [row, *(other for other in siblings if other != row)]:
            try:
                return load(candidate, view)
            except CorruptImageError as error:
                if candidate == row and view == 0:
                    log.warning(
                        "undecodable image %s (%s): another one of its product stands in", index.image_key(row), error
                    )
        raise ValueError(f"{index.image_key(row)}: no image of its product can be decoded; pack the catalogue again")

    def fill(out: np.memmap) -> None:
        flat = out.reshape(-1, *shape[2:])
        tower = _fast_tower(model.image_encoder, device)
        with torch.inference_mode():
            for first in tqdm(
                range(0, len(flat), 32), desc="caching image features", unit="batch", disable=not progress
            ):
                batch = torch.stack([load_or_substitute(i) for i in range(first, min(first + 32, len(flat)))]).to(
                    device
                )
                flat[first : first + 32] = tower(batch).half().cpu().numpy()

    return _cached(cache_dir / f"images-{name}.npy", shape, fill)


def _text_features(
    cache_dir: Path,
    model: ECLIP,
    index: ShardIndex,
    tokenizer: WordPiece,
    config: RunConfig,
    device: torch.device,
    progress: bool,
) -> np.ndarray:
    # A title that several images share is encoded once.
    _, first_row, inverse = np.unique(index.title_ids, return_index=True, return_inverse=True)
    tokens, bounds = tokenizer.encode([index.title(int(row)) for row in first_row], config.data.max_tokens)
    settings = [index.fingerprint, weights_fingerprint(model.text_encoder), config.model.text_pooling]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8)
    digest.update(tokens.numpy().data)  # stands for the vocabulary and the cut at max_tokens
    name = digest.hexdigest()

    def fill(out: np.memmap) -> None:
        chunks = []
        with torch.inference_mode():
            for first in tqdm(
                range(0, len(first_row), 64), desc="caching text features", unit="batch", disable=not progress
            ):
                chunk = bounds[first : first + 65]
                ids = tokens[int(chunk[0]) : int(chunk[-1])].to(device)
                chunks.append(model.text_tower(ids, (chunk - chunk[0]).to(device)).half().cpu().numpy())
        out[:] = np.concatenate(chunks)[inverse.reshape(-1)]

    return _cached(cache_dir / f"texts-{name}.npy", (index.num_images, config.model.text_width), fill)
