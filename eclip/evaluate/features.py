"""Everything the tasks compare, computed in one pass over a split's images.

Letters: n images, D embedding width, N patch tokens. Per image: the global feature g_I(v_cls), the feature g_T(w_cls)
of its own title, the instance embedding prompted by each of the two, and two score maps for "where is what the title
names": the decoder's assignment of patches to the title's query, and (CLIP's usual way) the cosine of patch and title.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eclip.config import RunConfig
from eclip.dataloading.images.decode import CorruptImageError
from eclip.dataloading.pipeline import decode_square
from eclip.dataloading.schema import SOURCES
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.text import WordPiece
from eclip.model.eclip import ECLIP
from eclip.training.feature_cache.cache import FeatureCache

TEXT_PROMPT, IMAGE_PROMPT = 0, 1
"""Modality codes of `ECLIP.instance_queries`."""

_SHOWN = 5  # names in a message


@dataclass(kw_only=True)
class Features:
    """Features of n images (CPU, float32, embeddings L2-normalised) and the facts that label them.

    Memory: 4 n (4 D + 2 N) bytes, 4 KiB an image at D=192, N=64 and 14 KiB at D=768, N=196.
    """

    rows: NDArray[np.int64]
    """(n,) rows of the shard index, ascending."""
    products: NDArray[np.int64]
    """(n,) positions of the products in the index."""
    sources: NDArray[np.str_]
    """(n,) members of schema.SOURCES."""
    titles: NDArray[np.int64]
    """(n,) equal where the titles are equal."""
    global_image: Tensor
    """(n, D)."""
    text: Tensor
    """(n, D) feature of the image's own title."""
    global_map: Tensor
    """(n, N) cosine of each projected patch token with the title."""
    instance_image: Tensor | None
    """(n, D) instance embedding prompted by the image's own global feature; None without a trained decoder."""
    instance_text: Tensor | None
    """(n, D) instance embedding prompted by the title."""
    instance_map: Tensor | None
    """(n, N) share of each patch token that the title's query takes from the T-1 others."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> "Features":
        """The same features for some of the images."""
        chosen = torch.from_numpy(np.flatnonzero(keep) if keep.dtype == bool else keep)
        picked: dict[str, Any] = {
            name: value[chosen] if isinstance(value, Tensor) else value[chosen.numpy()]
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **picked)

    def embeddings(self) -> dict[str, Tensor]:
        """The rows of the tables: name -> (n, D), L2-normalised.

        The text enters the instance embedding only as prompt (its content is visual) and the global one by addition;
        "instance + text" adds the title to the instance embedding in the same way, for a comparison of equals.
        """
        both = None if self.instance_text is None else F.normalize(self.instance_text + self.text, dim=-1)
        found: dict[str, Tensor | None] = {
            "instance (image)": self.instance_image,
            "global (image)": self.global_image,
            "instance (image+text)": self.instance_text,
            "instance + text": both,
            "global (image+text)": F.normalize(self.global_image + self.text, dim=-1),
            "text only": self.text,
        }
        return {name: value for name, value in found.items() if value is not None}

    def score_maps(self) -> dict[str, Tensor]:
        """name -> (n, N) score maps for grounding."""
        found = {"instance": self.instance_map, "global": self.global_map}
        return {name: value for name, value in found.items() if value is not None}


def decoder_is_trained(config: RunConfig) -> bool:
    """Whether any loss of the run reached the instance decoder (L_R alone sharpens it but teaches it nothing)."""
    losses = config.objective
    return losses.objective == "eclip" and max(losses.inter_weight, losses.itm_weight, losses.intra_weight) > 0


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
    title_ids = index.title_ids[rows]
    _, first, title_of = np.unique(title_ids, return_index=True, return_inverse=True)
    titles = [index.title(int(rows[i])) for i in first]
    texts = encode_texts(model, tokenizer, titles, max_tokens=config.data.max_tokens, device=device)

    trained = decoder_is_trained(config)
    parts: dict[str, list[Tensor]] = {}
    kept: list[NDArray[np.int64]] = []
    corrupt: list[str] = []
    for start in tqdm(range(0, len(rows), batch_size), desc=label, unit="batch", disable=not progress):
        places = np.arange(start, min(start + batch_size, len(rows)))
        if cache is not None:
            bad = {int(row): cache.undecodable[int(row)] for row in rows[places] if int(row) in cache.undecodable}
            corrupt += [f"{index.image_key(row)}: {reason}" for row, reason in bad.items()]
            places = places[[int(row) not in bad for row in rows[places]]]
            if not len(places):
                continue
            tower = cache.tower_outputs(rows[places]).to(device)
        else:
            places, images = _decode(index, rows, places, config.model.image_size, corrupt)
            if not len(places):
                continue
            tower = model.image_tower(images.to(device))
        text = texts[torch.from_numpy(title_of[places]).to(device)]
        found = {name: value.float().cpu() for name, value in _embed(model, tower, text, trained).items()}
        if not kept and not any(value.isfinite().any() for value in found.values()):
            _require_finite(found.values(), [index.image_key(int(rows[p])) for p in places], "images")
        kept.append(places)
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    if not kept:
        raise ValueError(f"none of the {len(rows)} images could be decoded; the first: {''.join(corrupt[:1])}")

    at = np.concatenate(kept)
    chosen = rows[at]
    joined = {name: torch.cat(values) for name, values in parts.items()}
    _require_finite(joined.values(), [index.image_key(int(row)) for row in chosen], "images")
    features = Features(
        rows=chosen,
        products=np.searchsorted(index.image_start, chosen, side="right") - 1,
        sources=np.array(SOURCES)[index.image_source[chosen]],
        titles=title_ids[at],
        global_image=joined["global_image"],
        text=joined["text"],
        global_map=joined["global_map"],
        # Absent without a trained decoder.
        instance_image=joined.get("instance_image"),
        instance_text=joined.get("instance_text"),
        instance_map=joined.get("instance_map"),
    )
    return features, corrupt


def _decode(
    index: ShardIndex, rows: NDArray[np.int64], places: NDArray[np.int64], size: int, corrupt: list[str]
) -> tuple[NDArray[np.int64], Tensor]:
    """Read and decode some rows: the places that worked and their images (m, 3, S, S) uint8; the rest in `corrupt`.

    Raises DataError for a tar at fault: its images are not corrupt, and tables without them would be silently others.
    """
    images, good = [], []
    for place in places:
        row = int(rows[place])
        try:
            images.append(decode_square(index.read_image(row), size))
        except CorruptImageError as error:
            corrupt.append(f"{index.image_key(row)}: {error}")
        else:
            good.append(int(place))
    return np.array(good, dtype=np.int64), torch.stack(images) if images else torch.empty(0, 3, size, size)


def _embed(model: ECLIP, tower: Tensor, text: Tensor, trained: bool) -> dict[str, Tensor]:
    """tower (b, 1+N, width), text (b, D) -> the tensor fields of Features for these images."""
    image = model.project_image(tower)
    unit_text = F.normalize(text, dim=-1)
    found = {
        "global_image": F.normalize(image.cls, dim=-1),
        "text": unit_text,
        "global_map": torch.einsum("bnd,bd->bn", F.normalize(image.tokens, dim=-1), unit_text),
    }
    if trained:
        by_image = model.decode_queries(image.tokens, model.instance_queries(image.cls, IMAGE_PROMPT))
        by_text = model.decode_queries(image.tokens, model.instance_queries(text, TEXT_PROMPT), return_map=True)
        # Slot 0 is the positive query.
        found["instance_image"] = F.normalize(by_image.slots[:, 0], dim=-1)
        found["instance_text"] = F.normalize(by_text.slots[:, 0], dim=-1)
        assert by_text.assignment is not None
        found["instance_map"] = by_text.assignment[:, 0]
    return found
