"""The records of a catalogue and the batch of a training step.

A sample of a shard is one product: `<key>.json` (a `Product`) and its images `<key>.000.jpg`, `<key>.001.jpg`, ...
Real catalogues may leave out what only the embedded one knows (boxes, SKUs, sources): the defaults say what is assumed.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_origin

if TYPE_CHECKING:  # packing starts a process per core, and these records need no torch
    from torch import Tensor

SOURCES = ("detail", "customer", "ad")
"""Where an image comes from: the shop's detail page, a customer's photo, an advertisement's frame."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the stored image, half-open."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One product seen in an image: the box of its VISIBLE pixels and the visible share of them."""

    product: str
    sku: str
    box: Box
    visible: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image of a product. `instances` starts with the product itself; distractors follow."""

    file: str
    source: str = "detail"
    sku: str = ""
    title: str = ""
    width: int = 0
    height: int = 0
    instances: tuple[Instance, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Product:
    """One sample of a shard: a product, its facts and its images."""

    key: str
    product: str
    title: str
    category: str
    catalog: str = ""
    titles: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    skus: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: tuple[ImageRecord, ...] = ()

    def to_json(self) -> bytes:
        """UTF-8 JSON, keys in declaration order."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> "Product":
        """Parse and validate a sample's JSON; `where` names it in errors. Raises ValueError.

        Fields of a product that are not known here are passed over: writers of other shards add their own.
        """
        try:
            record = json.loads(data)
        except RecursionError:
            raise ValueError(f"{where}: not a product record: nested too deeply") from None
        except ValueError as error:
            cause = str(error)
            if (at := data.find(b"\0")) >= 0:
                cause = f"zeros from byte {at} on, as a download that was cut leaves them"
            raise ValueError(f"{where}: not valid JSON ({cause if data else 'empty'})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
        for name in ("title", "product", "category"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                held = ", ".join(list(record)[:_SHOWN]) or "nothing"
                raise ValueError(
                    f"{where}: no {name!r}; every product needs a non-empty {name!r} string (this one has: {held})"
                )
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {k: v for k, v in record.items() if k in known}
        return _made(cls, {"key": record["product"], "catalog": record["product"], **fields}, where, "")


_SHOWN = 8  # names in a message
R = TypeVar("R")
_INSIDE: Mapping[tuple[Any, str], type] = {(Product, "images"): ImageRecord, (ImageRecord, "instances"): Instance}


def _made(cls: Callable[..., R], record: Any, where: str, place: str) -> R:
    """A record of class `cls` out of JSON, every field of its kind; `place` is the record's within the sample."""
    fields = _kinds(cls)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a product record: {place} is {_short(record)}, not an object {{...}}")
    if odd := record.keys() - fields.keys():
        raise ValueError(f"{where}: not a product record: {place} has {min(odd)!r}; its fields are {', '.join(fields)}")
    values = dict(record)
    start = f"{place}." if place else ""
    for name, value in record.items():
        inside = _INSIDE.get((cls, name))
        if not fields[name].fits(value):
            raise ValueError(f"{where}: {start}{name} is {_short(value)}; it must be {fields[name].words}")
        if inside is not None:
            values[name] = tuple(_made(inside, v, where, f"{start}{name}[{i}]") for i, v in enumerate(value))
        elif type(value) is str:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{where}: {start}{name} is {value!r}, which holds half a character; write it as UTF-8"
                ) from None
        elif type(value) is list:
            values[name] = tuple(value)
    try:
        return cls(**values)
    except TypeError:
        absent = next(name for name, kind in fields.items() if kind.required and name not in values)
        raise ValueError(f"{where}: not a product record: {place} has no {absent!r}") from None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "text, in quotes": lambda value: type(value) is str,
    "a number": _is_number,
    "four numbers": lambda value: type(value) is list and len(value) == 4 and all(map(_is_number, value)),
    "a list [...]": lambda value: type(value) is list,
    "an object {...}": lambda value: type(value) is dict,
}
_WORDS: Mapping[Any, str] = {str: "text, in quotes", int: "a number", float: "a number", Box: "four numbers"}


class _Kind(NamedTuple):
    """What a field holds."""

    words: str
    fits: Callable[[Any], bool]
    required: bool


@cache
def _kinds(cls: Any) -> Mapping[str, _Kind]:
    """The kinds of a record's fields."""
    kinds = {}
    for f in dataclasses.fields(cls):
        words = _WORDS.get(f.type, "a list [...]" if get_origin(f.type) is tuple else "an object {...}")
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        kinds[f.name] = _Kind(words, _FITS[words], required)
    return kinds


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(kw_only=True)
class Batch:
    """B products, two images of different sources each (views a and b), and a title for each image.

    Rank r of W holds rows [r*B, (r+1)*B) of the global batch. Ragged titles: sequence s is
    tokens[cu_seqlens[s]:cu_seqlens[s+1]]; sequences 0..B-1 belong to views a, B..2B-1 to views b.
    """

    images: "Tensor | None"
    """(B, 2, 3, S, S) uint8, RGB; None when the loader runs with decoder="none" (cached features)."""
    image_rows: "Tensor"
    """(B, 2) int64: rows of the shard index, keys of the feature cache."""
    tokens: "Tensor"
    """(total,) int64 ids of pieces."""
    cu_seqlens: "Tensor"
    """(2B+1,) int32."""
    product_ids: "Tensor"
    """(B,) int64, equal where products are equal."""
    catalog_ids: "Tensor"
    """(B,) int64."""
    category_ids: "Tensor"
    """(B,) int64, positions in the index's list of categories."""
    title_ids: "Tensor"
    """(B, 2) int64, equal where titles are equal."""
    keys: list[str]
    """2B names "product/file", views a then views b: what an error message prints."""
    step: int
    epoch: int
    corrupt: tuple[str, ...] = ()
    """Keys of images first found undecodable in this batch; another image of the product took their place."""
    part: int = 0
    """Which part of its rank's share of the step this is: a share may come in micro-batches, in order."""
    parts: int = 1
    """Parts of the share, all of one size."""
    token_counts: tuple[int, int] | None = None
    """Tokens of all titles of views a, and of views b, as whoever made the batch counted them; None: nobody did."""
    longest: tuple[int, int] | None = None
    """Tokens of the longest title of views a, and of views b."""

    def titles(self, view: int) -> "tuple[Tensor, Tensor, int]":
        """The titles of a view: tokens, (B+1,) bounds that begin with 0, and the tokens of the longest one.

        Where they were counted nothing is read from the tensors: nobody waits for a device. Otherwise raises
        ValueError for an empty title.
        """
        counts, longest = self.token_counts, self.longest
        if counts is None or longest is None:
            counts, longest = count_titles(self.cu_seqlens)
        rows = len(self.product_ids)
        bounds = self.cu_seqlens[view * rows : (view + 1) * rows + 1]
        start = view * counts[0]
        return self.tokens[start : start + counts[view]], bounds - bounds[0], longest[view]

    def map(self, change: "Callable[[Tensor], Tensor]") -> "Batch":
        """The same batch with every tensor changed."""
        changed: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if hasattr(v, "pin_memory")}
        return dataclasses.replace(self, **changed)

    def to(self, device: Any) -> "Batch":
        """The same batch with every tensor on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch with what lies on the CPU in pinned memory, which a GPU copies from beside its work.

        Without CUDA nothing changes.
        """
        import torch

        if not torch.cuda.is_available():
            return self
        return self.map(lambda tensor: tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory())


def count_titles(cu_seqlens: "Tensor") -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a batch's bounds (2B+1,): tokens of views a and of views b, and those of the longest title of each.

    Raises ValueError when a title is empty: it has no token to pool.
    """
    lengths = cu_seqlens.diff().view(2, -1)
    if not lengths.numel() or int(lengths.min()) < 1:
        raise ValueError("cu_seqlens describes an empty text; every text needs at least one token ([CLS], [SEP])")
    (a, b), (longest_a, longest_b) = lengths.sum(1).tolist(), lengths.amax(1).tolist()
    return (a, b), (longest_a, longest_b)
