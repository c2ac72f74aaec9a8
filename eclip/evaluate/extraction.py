"""Features of a split's images in one pass, and of any texts: computed once, before the tasks.

What an image's embeddings and maps are is the objective's to say: `Objective.embed`.

Letters: m images of a batch, S side of the square image, D embedding width.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eclip.config import RunConfig
from eclip.dataloading.images import CorruptImageError
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.schema import SOURCES
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import WordPiece
from eclip.evaluate.features import Features
from eclip.model.eclip import ECLIP
from eclip.objectives.objective import make_objective
from eclip.training.feature_cache.cache import FeatureCache

_SHOWN = 5  # names in a message


@torch.inference_mode()
def encode_texts(
    model: ECLIP, tokenizer: WordPiece, texts: Sequence[str], *, max_tokens: int, device: torch.device, chunk: int = 256
) -> Tensor:
    """g_T features of any texts, NOT normalised: (len(texts), D) float32 on `device`.

    Raises ValueError naming texts whose features are not finite.
    """
    parts = []
    for start in range(0, len(texts), chunk):
        tokens, cu_seqlens = tokenizer.encode(list(texts[start : start + chunk]), max_tokens)
        parts.append(model.encode_text(tokens.to(device), cu_seqlens.to(device)).float())
        _require_finite(parts[-1:], [repr(text) for text in texts[start : start + chunk]], "texts")
    return torch.cat(parts)


@torch.inference_mode()
def extract_features(
    model: ECLIP,
    index: ShardIndex,
    tokenizer: WordPiece,
    config: RunConfig,
    rows: NDArray[np.int64],
    *,
    device: torch.device,
    batch_size: int = 64,
    cache: FeatureCache | None = None,
    progress: bool = True,
    label: str = "features",
) -> tuple[Features, list[str]]:
    """Compute the features of `rows`, batch_size images at a time; results are kept on the CPU.

    Returns them and one "key: reason" for each image that could not be decoded; those rows are left out. With a
    `cache` the image tower's outputs are read from it and no image is decoded. Raises ValueError if nothing is left,
    and for features that are NaN or infinite, naming images: they would rank first everywhere.
    """
    _, first, title_of = np.unique(index.title_ids[rows], return_index=True, return_inverse=True)
    titles = [index.title(int(rows[i])) for i in first]
    texts = encode_texts(model, tokenizer, titles, max_tokens=config.data.max_tokens, device=device)

    objective = make_objective(config.objective)
    parts: dict[str, list[Tensor]] = {}
    kept: list[NDArray[np.int64]] = []
    corrupt: list[str] = []
    for start in tqdm(range(0, len(rows), batch_size), desc=label, unit="batch", disable=not progress):
        places = np.arange(start, min(start + batch_size, len(rows)))
        if cache is not None:
            places = places[_not_corrupt(cache, index, rows[places], corrupt)]
            tower = cache.tower_outputs(rows[places]).to(device) if len(places) else None
        else:
            good, images = _decode(index, rows[places], config.model.image_size, corrupt)
            places = places[good]
            tower = model.image_tower(images.to(device)) if len(places) else None
        if tower is None:
            continue
        text = texts[torch.from_numpy(title_of[places]).to(device)]
        embedded = objective.embed(model, model.project_image(tower), text)
        found = {name: value.float().cpu() for name, value in embedded.items()}
        if not kept and not any(value.isfinite().any() for value in found.values()):
            # All of the first batch: the rest need not be waited for.
            _require_finite(found.values(), [index.image_key(int(row)) for row in rows[places]], "images")
        kept.append(places)
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    if not kept:
        raise ValueError(f"none of the {len(rows)} images could be decoded; the first: {''.join(corrupt[:1])}")
    return _join(index, rows[np.concatenate(kept)], parts), corrupt


def _not_corrupt(
    cache: FeatureCache, index: ShardIndex, rows: NDArray[np.int64], corrupt: list[str]
) -> NDArray[np.bool_]:
    """Which of the rows were decodable when the cache was written; the others in `corrupt`."""
    bad = {int(row): cache.undecodable[int(row)] for row in rows if int(row) in cache.undecodable}
    corrupt += [f"{index.image_key(row)}: {reason}" for row, reason in bad.items()]
    return np.array([int(row) not in bad for row in rows], dtype=bool)


def _decode(
    index: ShardIndex, rows: NDArray[np.int64], size: int, corrupt: list[str]
) -> tuple[NDArray[np.bool_], Tensor]:
    """Read and decode: which of the rows worked, and their images (m, 3, S, S) uint8; the others in `corrupt`.

    Raises DataError for a tar at fault: its images are not corrupt, and tables without them would be silently others.
    """
    images, good = [], np.zeros(len(rows), dtype=bool)
    for place, row in enumerate(map(int, rows)):
        try:
            images.append(decode_square(index.read_image(row), size))
        except CorruptImageError as error:
            corrupt.append(f"{index.image_key(row)}: {error}")
        else:
            good[place] = True
    return good, torch.stack(images) if images else torch.empty(0, 3, size, size)


def _join(index: ShardIndex, rows: NDArray[np.int64], parts: dict[str, list[Tensor]]) -> Features:
    """The batches as one; raises ValueError for what is not finite in them."""
    joined = {name: torch.cat(values) for name, values in parts.items()}
    _require_finite(joined.values(), [index.image_key(int(row)) for row in rows], "images")
    return Features(
        rows=rows,
        products=np.searchsorted(index.image_start, rows, side="right") - 1,
        sources=np.array(SOURCES)[index.image_source[rows]],
        titles=index.title_ids[rows],
        global_image=joined["global_image"],
        text=joined["text"],
        global_map=joined["global_map"],
        # Absent without a trained decoder.
        instance_image=joined.get("instance_image"),
        instance_text=joined.get("instance_text"),
        instance_map=joined.get("instance_map"),
    )


def _require_finite(values: Iterable[Tensor], names: Sequence[str], what: str) -> None:
    """Raise ValueError naming the rows that hold NaN or infinity in any of `values` (n, ...)."""
    good = torch.stack([value.flatten(1).isfinite().all(1).cpu() for value in values]).all(0)
    bad = [names[i] for i in np.flatnonzero(~good.numpy())]
    if not bad:
        return
    shown = ", ".join(bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else "")
    cause = "the checkpoint is damaged or its training diverged" if len(bad) == len(names) else "the model overflows"
    raise ValueError(
        f"{len(bad)} of {len(names)} {what} have features that are NaN or infinite ({shown}): {cause}; "
        f"nothing was evaluated, take an earlier checkpoint or another run"
    )
