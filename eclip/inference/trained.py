"""`TrainedModel`: what a shop's engineer or a researcher asks of a trained model, in numpy and boxes.

Letters: n images, m texts, D embedding width, g patches along a side.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eclip.dataloading.images import CorruptImageError
from eclip.dataloading.schema import Box
from eclip.inference.encoding import IMAGE, TEXT, EncodedImages, Encoder
from eclip.inference.pictures import Picture, describe, is_picture, read_picture
from eclip.inference.regions import Region, find_regions

DEFAULT_THRESHOLD = 0.5
BATCH = 32
Vectors = NDArray[np.float32]
ProductKind = Literal["instance", "instance+text", "global+text"]


class TrainedModel:
    """A model to use. Embeddings are float32 rows of unit length: a dot product of two is their cosine.

    Wherever many are taken, one alone is taken as well, for a result of one row. An image is a path, the bytes of a
    file, an open file, a PIL image or a uint8 array (H, W, 3), of any size and format that Pillow reads (`Picture`);
    one that cannot be read raises ValueError, which names it. Threads may share a model.
    """

    def __init__(self, encoder: Encoder, *, source: str, threshold: float = DEFAULT_THRESHOLD) -> None:
        """source: the folder that it is from. threshold: cuts score maps into regions, in [0, 1)."""
        self.encoder, self.source, self.threshold = encoder, source, threshold

    def __repr__(self) -> str:
        encoder = self.encoder
        return f"TrainedModel({self.source!r}, embed_dim={encoder.embed_dim}, device='{encoder.device}')"

    @property
    def embed_dim(self) -> int:
        """D, the width of every embedding."""
        return self.encoder.embed_dim

    def embed_texts(self, texts: str | Iterable[str]) -> Vectors:
        """Titles or words of a query: (m, D). Raises ValueError for an empty text: it has nothing to say."""
        return _numpy(F.normalize(self.text_features(texts), dim=-1))

    def embed_images(
        self,
        images: Picture | Iterable[Picture],
        prompts: str | Iterable[str] | Picture | Iterable[Picture] | None = None,
        *,
        instance: bool | None = None,
        boxes: Sequence[Box | None] | None = None,
        batch_size: int = BATCH,
    ) -> Vectors:
        """Images to (n, D): whole pictures, or the one product in each that a prompt names.

        prompts: one for each image: a str is a text, anything else an exemplar image (a Path, bytes, ...). With
        them, or with `instance=True`, where each image prompts itself, the result is instance embeddings, else global
        ones. boxes: x0, y0, x1, y1 in pixels, the part of each image that is looked at (None: all of it).
        Raises ValueError for an image that cannot be read, which is named by its place; for a box without a pixel; for
        prompts of a model without a decoder. TypeError for what is no image.
        """
        pictures = _as_list(images, "images", "an image")
        wanted = prompts is not None if instance is None else instance
        if prompts is not None and not wanted:
            raise ValueError("instance=False with prompts: a prompt asks for an instance; leave one of the two out")
        asked = None if prompts is None else self.prompt_features(prompts, len(pictures), batch_size)
        return self._embed(pictures, asked, boxes, batch_size, wanted=wanted)

    def _embed(
        self,
        pictures: Sequence[Picture],
        asked: tuple[Tensor, int] | None,
        boxes: Sequence[Box | None] | None,
        batch_size: int,
        *,
        wanted: bool,
    ) -> Vectors:
        """asked: features and modality of a prompt each; wanted: instances, not global embeddings."""
        rows: list[Tensor] = []
        for start, encoded in self._encode(pictures, boxes, batch_size):
            if not wanted:
                rows.append(encoded.vectors)
            elif asked is None:
                rows.append(self.encoder.instances(encoded, encoded.features.cls, IMAGE).vectors)
            else:
                features, modality = asked
                part = features[start : start + len(encoded)]
                rows.append(self.encoder.instances(encoded, part, modality).vectors)
        return _numpy(torch.cat(rows))

    def embed_products(
        self,
        images: Picture | Iterable[Picture],
        titles: str | Iterable[str],
        *,
        kind: ProductKind = "instance",
        batch_size: int = BATCH,
    ) -> Vectors:
        """Products given by an image and a title each: (n, D).

        kind: "instance" is what the image shows of the title, visual content alone; "instance+text" adds the title's
        own embedding; "global+text" is CLIP's usual sum of both global embeddings.
        """
        if kind not in ("instance", "instance+text", "global+text"):
            raise ValueError(f"kind={kind!r}: use 'instance', 'instance+text' or 'global+text'")
        pictures, names = _as_list(images, "images", "an image"), _as_list(titles, "titles", "a title")
        if len(names) != len(pictures):
            raise ValueError(f"{len(pictures)} images and {len(names)} titles: give one title for each image")
        features = self.text_features(names) if names else torch.empty(0)
        wanted = kind != "global+text"
        visual = self._embed(pictures, (features, TEXT) if wanted else None, None, batch_size, wanted=wanted)
        if kind == "instance":
            return visual
        both = torch.from_numpy(visual) + F.normalize(features, dim=-1).float().cpu()
        return _numpy(F.normalize(both, dim=-1))

    def locate(
        self,
        image: Picture,
        prompt: str | Picture,
        *,
        box: Box | None = None,
        threshold: float | None = None,
        limit: int = 5,
    ) -> list[Region]:
        """Where in an image is what a text or an exemplar image shows: at most `limit` regions, the heaviest first.

        prompt: as in `embed_images`; box: the part of the EXEMPLAR that is meant. threshold: in [0, 1), cuts the map
        (brought to [0, 1]) into regions; None: the one that the run's evaluation chose, else 0.5. A region says where
        the prompt fits best, not whether it is there at all: `match` does.
        """
        if box is not None and isinstance(prompt, str):
            raise ValueError(f"box={box} with a text: it is the part of an exemplar image that is meant; leave it out")
        cut = self.threshold if threshold is None else threshold
        if not 0 <= cut < 1:
            raise ValueError(f"threshold={threshold}: a share of the map's range, 0 <= threshold < 1")
        if limit < 1:
            raise ValueError(f"limit={limit}: ask for at least one region")
        features, modality = self.prompt_features(prompt, 1, BATCH, boxes=None if box is None else [box])
        encoded = self.encode([image])
        scores = self.encoder.maps(encoded, features, modality)
        side = self.encoder.image_size
        return find_regions(_numpy(scores[0]), encoded.sizes[0], side=side, threshold=cut, limit=limit)

    def match(
        self, images: Picture | Iterable[Picture], texts: str | Iterable[str], *, batch_size: int = BATCH
    ) -> Vectors:
        """(n, m) probability, by the matching head (L_itm), that text j names something that image i shows.

        Each image is encoded once, and decoded with each text as prompt: n m passes of the decoder. Raises ValueError
        for a model without a trained decoder.
        """
        self.encoder.require_decoder()
        features = self.text_features(texts)
        rows = []
        for _, encoded in self._encode(_as_list(images, "images", "an image"), None, batch_size):
            columns = []
            for feature in features:
                prompts = feature.expand(len(encoded), -1)
                columns.append(self.encoder.match(self.encoder.instances(encoded, prompts, TEXT).vectors, prompts))
            rows.append(torch.stack(columns, dim=1))
        return _numpy(torch.cat(rows))

    def encode(
        self,
        images: Sequence[Picture],
        boxes: Sequence[Box | None] | None = None,
        *,
        name: str = "images",
        first: int = 0,
    ) -> EncodedImages:
        """One pass of the image tower over a batch, for `encoder` to ask several prompts of.

        name, first: an image that cannot be read is called name[first + its place].
        """
        pictures = list(images)
        places: Sequence[Box | None] = [None] * len(pictures) if boxes is None else boxes
        if len(places) != len(pictures):
            raise ValueError(f"{len(pictures)} images and {len(places)} boxes: give one box (or None) for each image")
        read = [
            _named(f"{name}[{first + i}]", picture, partial(read_picture, picture, self.encoder.image_size, box))
            for i, (picture, box) in enumerate(zip(pictures, places, strict=True))
        ]
        return self.encoder.images(torch.stack([pixels.square for pixels in read]), [pixels.size for pixels in read])

    def text_features(self, texts: str | Iterable[str]) -> Tensor:
        """(m, D) features of texts, not normalised, on the model's device. Raises ValueError for an empty text."""
        listed = _as_list(texts, "texts", "a text")
        if not listed:
            raise ValueError("no texts: give at least one")
        for i, text in enumerate(listed):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is a {type(text).__name__}: give str")
            if not text.strip():
                raise ValueError(f"texts[{i}] is empty: give a title or the words of a query")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"texts[{i}] {text!r} holds half a letter (a surrogate): decode its bytes as UTF-8")
        return torch.cat([self.encoder.texts(listed[i : i + 256]) for i in range(0, len(listed), 256)])

    def prompt_features(
        self, prompts: Any, count: int, batch_size: int, *, boxes: Sequence[Box | None] | None = None
    ) -> tuple[Tensor, int]:
        """(count, D) features of prompts and their modality. Raises ValueError when there are not `count` of them."""
        listed = _as_list(prompts, "prompts", "a text or an image")
        if len(listed) != count:
            raise ValueError(f"{count} images and {len(listed)} prompts: give one prompt for each image")
        texts = [prompt for prompt in listed if isinstance(prompt, str)]
        if not texts:
            parts = [encoded.features.cls for _, encoded in self._encode(listed, boxes, batch_size, "prompts")]
            return torch.cat(parts), IMAGE
        if len(texts) != len(listed):
            raise ValueError("prompts of texts and images together: ask in two calls")
        for text in texts:
            if os.path.isfile(text):  # False for what can be no path: Path.is_file raises for a long text
                raise ValueError(f"prompt {text!r} names a file, and a str is a text; give Path({text!r}) to show it")
        return self.text_features(texts), TEXT

    def _encode(
        self, pictures: Sequence[Picture], boxes: Sequence[Box | None] | None, batch_size: int, name: str = "images"
    ) -> Iterator[tuple[int, EncodedImages]]:
        """Batch after batch, with the place of its first image. name: of the pictures, for messages."""
        if not pictures:
            raise ValueError("no images: give at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: take at least one image at a time")
        if boxes is not None and len(boxes) != len(pictures):
            raise ValueError(f"{len(pictures)} images and {len(boxes)} boxes: give one box (or None) for each image")
        for start in range(0, len(pictures), batch_size):
            stop = start + batch_size
            places = None if boxes is None else boxes[start:stop]
            yield start, self.encode(pictures[start:stop], places, name=name, first=start)


def _as_list(values: Any, name: str, one: str) -> list[Any]:
    """One value alone, or any iterable of them, as a list. Raises TypeError that says what `name` is instead."""
    if is_picture(values):  # a str too
        return [values]
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is a {type(values).__name__}: give {one}, or a list of them")
    return list(values)


def _named(name: str, picture: Any, read: Callable[[], Any]) -> Any:
    """What `read` gives; its error is said of this image."""
    try:
        return read()
    except (CorruptImageError, ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} ({describe(picture)}): {error}") from error


def _numpy(tensor: Tensor) -> Vectors:
    return tensor.float().cpu().numpy()
