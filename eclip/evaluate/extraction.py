"""Features of a split's images in one pass, and of any texts: computed once, before the tasks.

What an image's embeddings and maps are is the objective's to say: `Objective.embed`. Several ranks take the batches in
turn, texts too (together.py); a batch is the same whoever takes it.

Letters: m images of a batch, S side of the square image, D embedding width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eclip.config import RunConfig
from eclip.dataloading.images import CorruptImageError
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.schema import SOURCES
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import Tokenizer
from eclip.evaluate.extras import NOTHING, Extras, product_positions
from eclip.evaluate.features import Features, Prompted
from eclip.evaluate.prompting import decode_by_text
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.objectives.objective import make_objective
from eclip.parallel.ranks import ALONE, Ranks
from eclip.training.feature_cache.cache import FeatureCache

T = TypeVar("T")

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class EncodedBatch:
    """What became of some of the rows."""

    places: NDArray[np.int64]
    """(m,) of the rows that could be decoded, among those asked for."""
    found: dict[str, Tensor]
    """(m, ...) float32 on the CPU by name; empty when m is 0."""
    prompted: dict[str, Tensor]
    """Of the p that another title prompts: "text" and, of a trained decoder, "instance"; unit vectors (p, D)."""
    tokens: dict[int, Tensor]
    """Row -> (N, D) float16 on the CPU, of those that are wanted."""
    corrupt: list[str]
    """One "key: reason" for each of the others."""


@torch.inference_mode()
def encode_texts(
    model: ECLIP,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int,
    device: torch.device,
    chunk: int = 256,
    ranks: Ranks = ALONE,
) -> Tensor:
    """g_T features of any texts, NOT normalised: (len(texts), D) float32 on `device`, on every rank.

    Raises ValueError naming texts whose features are not finite.
    """
    parts: list[Tensor] = []
    for number in ranks.share(-(-len(texts) // chunk)):
        start = number * chunk
        tokens, cu_seqlens = tokenizer.encode(list(texts[start : start + chunk]), max_tokens)
        parts.append(model.encode_text(tokens.to(device), cu_seqlens.to(device)).float())
        _require_finite(parts[-1:], [repr(text) for text in texts[start : start + chunk]], "texts")
    if ranks.world_size > 1:
        parts = [part.to(device) for part in _in_turn(ranks.gather([part.cpu() for part in parts]))]
    return torch.cat(parts)


def extract_features(
    model: ECLIP,
    index: ShardIndex,
    tokenizer: Tokenizer,
    config: RunConfig,
    rows: NDArray[np.int64],
    *,
    device: torch.device,
    batch_size: int = 64,
    cache: FeatureCache | None = None,
    progress: bool = True,
    label: str = "features",
    extras: Extras = NOTHING,
    ranks: Ranks = ALONE,
) -> tuple[Features, list[str]]:
    """Compute the features of `rows` (ascending), batch_size images at a time; results are kept on the CPU.

    Returns them and one "key: reason" for each image that could not be decoded; those rows are left out. With a
    `cache` the image tower's outputs are read from it and no image is decoded. Of several `ranks` this is rank 0, and
    the others call `encode_batches` with the same arguments. Raises ValueError if nothing is left, and for features
    that are NaN or infinite, naming images: they would rank first everywhere.
    """
    batches = encode_batches(
        model,
        index,
        tokenizer,
        config,
        rows,
        device=device,
        batch_size=batch_size,
        cache=cache,
        progress=progress,
        label=label,
        extras=extras,
        ranks=ranks,
    )
    assert batches is not None, "rank 0 has those of all"
    corrupt = [line for batch in batches for line in batch.corrupt]
    kept = [batch for batch in batches if len(batch.places)]
    if not kept:
        raise ValueError(f"none of the {len(rows)} images could be decoded; the first: {''.join(corrupt[:1])}")
    parts = {name: [batch.found[name] for batch in kept] for name in kept[0].found}
    features = _join(index, rows[np.concatenate([batch.places for batch in kept])], parts)
    features.prompted = _join_prompted(index, features.rows, extras, [batch.prompted for batch in kept])
    features.tokens = {row: tokens for batch in kept for row, tokens in batch.tokens.items()}
    return features, corrupt


@torch.inference_mode()
def encode_batches(
    model: ECLIP,
    index: ShardIndex,
    tokenizer: Tokenizer,
    config: RunConfig,
    rows: NDArray[np.int64],
    *,
    device: torch.device,
    batch_size: int,
    cache: FeatureCache | None,
    progress: bool,
    label: str,
    extras: Extras,
    ranks: Ranks,
) -> list[EncodedBatch] | None:
    """Encode this rank's share of the batches of `rows`; on rank 0 those of all ranks, in order, else None."""
    _, first, title_of = np.unique(index.title_ids[rows], return_index=True, return_inverse=True)
    titles = [index.title(int(row)) for row in rows[first]]
    texts = encode_texts(model, tokenizer, titles, max_tokens=config.data.max_tokens, device=device, ranks=ranks)
    objective, mine = make_objective(config.objective), list[EncodedBatch]()
    count = -(-len(rows) // batch_size)
    for number in tqdm(ranks.share(count), desc=label, unit="batch", disable=not progress):
        places = np.arange(number * batch_size, min((number + 1) * batch_size, len(rows)))
        places, tower, corrupt = _towers(model, index, config, rows, places, cache, device)
        found, prompted, tokens = dict[str, Tensor](), dict[str, Tensor](), dict[int, Tensor]()
        if tower is not None:
            image, text = model.project_image(tower), texts[torch.from_numpy(title_of[places]).to(device)]
            embedded = objective.embed(model, image, text)
            found = {name: value.float().cpu() for name, value in embedded.items()}
            if not any(batch.found for batch in mine) and not any(value.isfinite().any() for value in found.values()):
                # All of the first batch: the rest need not be waited for.
                _require_finite(found.values(), [index.image_key(int(row)) for row in rows[places]], "images")
            asked = [place for place, row in enumerate(rows[places]) if int(row) in extras.prompts]
            if asked:
                titles_of = np.searchsorted(rows, [extras.prompts[int(row)] for row in rows[places[asked]]])
                other = texts[torch.from_numpy(title_of[titles_of]).to(device)]
                prompted = _prompt(model, image, asked, other, decoder=objective.trains_decoder)
            kept = [(place, int(row)) for place, row in enumerate(rows[places]) if int(row) in extras.tokens]
            tokens = {row: image.tokens[place].half().cpu() for place, row in kept}
        mine.append(EncodedBatch(places, found, prompted, tokens, corrupt))
    shares = ranks.gather_to_main(mine)
    return None if shares is None else _in_turn(shares)


def _prompt(
    model: ECLIP, image: ImageFeatures, asked: Sequence[int], text: Tensor, *, decoder: bool
) -> dict[str, Tensor]:
    """`EncodedBatch.prompted` of the images at the places `asked`, each with its row of `text` (p, D)."""
    found = {"text": F.normalize(text, dim=-1)}
    if decoder:
        found["instance"] = decode_by_text(model, image.tokens[list(asked)], text)
    return {name: value.float().cpu() for name, value in found.items()}


def _in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """Pieces of work in order, from those that each rank did (`Ranks.share`)."""
    count = sum(len(share) for share in shares)
    return [shares[number % len(shares)][number // len(shares)] for number in range(count)]


def _towers(
    model: ECLIP,
    index: ShardIndex,
    config: RunConfig,
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    cache: FeatureCache | None,
    device: torch.device,
) -> tuple[NDArray[np.int64], Tensor | None, list[str]]:
    """The image tower's output for the decodable of rows[places], which they are, and what is said of the others."""
    corrupt: list[str] = []
    if cache is not None:
        places = places[_not_corrupt(cache, index, rows[places], corrupt)]
        return places, cache.tower_outputs(rows[places]).to(device) if len(places) else None, corrupt
    good, images = _decode(index, rows[places], config.model.image_size, corrupt)
    return places[good], model.image_tower(images.to(device)) if good.any() else None, corrupt


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
        products=product_positions(index, rows),
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


def _join_prompted(
    index: ShardIndex, rows: NDArray[np.int64], extras: Extras, parts: Sequence[dict[str, Tensor]]
) -> Prompted | None:
    """Of the decodable `rows` those that another title prompts, from the batches they were in."""
    asked = np.array([row for row in rows if int(row) in extras.prompts], dtype=np.int64)
    if not len(asked):
        return None
    joined = {name: torch.cat([part[name] for part in parts if part]) for name in max(parts, key=len)}
    _require_finite(joined.values(), [index.image_key(int(row)) for row in asked], "images")
    of = np.array([extras.prompts[int(row)] for row in asked], dtype=np.int64)
    return Prompted(
        rows=asked,
        products=product_positions(index, of),
        text=joined["text"],
        instance=joined.get("instance"),
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
