"""`embed_catalogue`: a model and a catalogue to a complete index, by any number of ranks, again after any kill."""

import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eclip.dataloading.system.console import progress_bar, say
from eclip.inference import TrainedModel
from eclip.parallel.ranks import ALONE, Ranks, part
from eclip.search.embed.catalogue import Catalogue
from eclip.search.embed.encode import Embedder
from eclip.search.embed.finish import batches, count, make_schema, narrowing
from eclip.search.embed.indexes import Kind, VectorIndex, missing, plan
from eclip.search.embed.parts import Parts
from eclip.search.embed.schema import FORMAT, need, record_of
from eclip.search.embed.store import Place

VectorKind = Literal["float32", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an index is to be."""

    out: str
    parquet: Path | None = None
    """Where the parts stay as Parquet files; None: in the index's work folder, until it is complete."""
    overwrite: bool = False
    thumbnail: int = 256
    """Longer side, pixels."""
    dim: int | None = None
    """Numbers of a vector; None: all."""
    vectors: VectorKind = "float32"
    index: Kind = "auto"
    facets: tuple[str, ...] = ()
    """Attributes to filter by; (): those with 2 to 200 values, fewer than products."""
    workers: int = 2
    progress: bool = True


@dataclass(frozen=True)
class Report:
    """What was done."""

    record: dict[str, Any]
    rejected: list[tuple[str, str]]
    embedded: int
    """Images, by this process."""
    seconds: float
    """That this took."""
    new: bool
    """False where the index was complete before."""


def check(settings: Settings, model: TrainedModel) -> None:
    """Raise ValueError for settings that cannot be."""
    need("lancedb", "pyarrow")
    width = model.embed_dim
    if settings.dim is not None and not 1 <= settings.dim <= width:
        raise ValueError(f"--dim {settings.dim}: the model has {width} numbers in a vector; take 1 to {width}")
    for name, value, low, high in (
        ("thumbnail", settings.thumbnail, 32, 4096),
        ("workers", settings.workers, 1, 256),
    ):
        if not low <= value <= high:
            raise ValueError(f"--{name} {value}: expected {low} to {high}")
    if Place(settings.out).is_address and settings.parquet is None:
        raise ValueError(
            f"--out {settings.out}: an address holds no unfinished work; name a folder for it: --parquet DIR"
        )


def embed_catalogue(
    model: TrainedModel, catalogue: Catalogue, settings: Settings, ranks: Ranks = ALONE
) -> Report | None:
    """Make the index of a catalogue; the report on rank 0, None on the others.

    Every rank must call it with equal arguments. Raises ValueError for settings that cannot be, an index or unfinished
    work of another making, a disk that is full, a damaged shard.
    """
    check(settings, model)
    place = Place(settings.out)
    parts = _parts(model, catalogue, settings, place)
    with ExitStack() as stack:
        absent = ranks.from_main(lambda: _prepare(parts, place, settings, catalogue, stack))
        if absent is None:
            part(ranks)
            record = place.record() if ranks.is_main else None
            return None if record is None else Report(record, [], 0, 0.0, False)
        began = time.monotonic()
        embedder = Embedder(model, thumbnail=settings.thumbnail, workers=settings.workers)
        mine = [absent[i] for i in ranks.share(len(absent))]
        done = _embed(embedder, catalogue, parts, mine, settings.progress and ranks.is_main)
        seconds = time.monotonic() - began
        part(ranks)  # all parts are there; what follows is rank 0's alone
        if not ranks.is_main:
            return None
        record, rejected = _finish(model, settings, place, parts)
        return Report(record, rejected, done, seconds, True)


def _parts(model: TrainedModel, catalogue: Catalogue, settings: Settings, place: Place) -> Parts:
    manifest = {
        "format": FORMAT,
        "model": model.encoder.fingerprint,
        "data": catalogue.name,
        "data fingerprint": catalogue.fingerprint,
        "images": len(catalogue),
        "threshold": model.threshold,
        "thumbnail": settings.thumbnail,
    }
    folder = settings.parquet
    if folder is None:
        assert place.work is not None
        folder = place.work / "parts"
    return Parts(folder, manifest, len(catalogue))


def making(parts: Parts, settings: Settings) -> str:
    """A digest of all that decides what the index holds."""
    told = [parts.manifest, settings.dim, settings.vectors, settings.index, settings.facets]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _prepare(
    parts: Parts, place: Place, settings: Settings, catalogue: Catalogue, stack: ExitStack
) -> list[int] | None:
    """The parts to be made; None where the index is complete. Raises ValueError for what may not be replaced."""
    stack.enter_context(place.own())
    if (record := place.record()) is not None and not settings.overwrite:
        if record.get("making") != making(parts, settings):
            raise ValueError(
                f"{place.out} holds an index of {record.get('rows')} images from {record.get('data')} by "
                f"{record.get('model')}, other than what is asked for; choose another --out, or --overwrite, which "
                f"replaces it when the new one is complete"
            )
        if not missing(place.open(), VectorIndex.of_record(record), record["has_decoder"]):
            place.clean()
            return None
    parts.start(overwrite=settings.overwrite)
    absent = parts.absent()
    if settings.progress:
        done = parts.count - len(absent)
        told = f"; {done} of {parts.count} parts are done already" if done else ""
        say(f"{catalogue.name}: {len(catalogue)} images{told}")
    return absent


def _embed(embedder: Embedder, catalogue: Catalogue, parts: Parts, mine: list[int], progress: bool) -> int:
    """Make the parts of one rank; how many images that were."""
    total = sum(last - first for first, last in map(parts.bounds, mine))
    with progress_bar(total, unit="image", desc="embedding", disable=not progress) as bar:
        for number in mine:
            rows = embedder.rows(catalogue.listings(*parts.bounds(number)), bar.update)
            parts.write(number, embedder.table(rows), rows.rejected)
    return total


def _finish(
    model: TrainedModel, settings: Settings, place: Place, parts: Parts
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Parts to a complete index; its record, and the images that were left out."""
    rejected = parts.rejected()
    census = count(parts, settings.facets)
    if not census.rows:
        name, reason = rejected[0]
        raise ValueError(f"none of the {parts.images} images can be read; the first, {name}: {reason}")
    narrow, told = narrowing(parts, model, settings.dim)
    if told and settings.progress:
        say(f"--dim {settings.dim}: {told}")
    index = plan(census.rows, settings.dim or model.embed_dim, settings.index, settings.vectors)
    schema = make_schema(
        model,
        parts,
        census,
        narrow,
        index,
        vectors=settings.vectors,
        making=making(parts, settings),
        rejected=len(rejected),
    )
    table = place.write(schema, batches(parts, schema, narrow, census.facets), index, say)
    record = record_of(table.schema)
    assert record is not None and table.count_rows() == census.rows, "a part was lost on the way"
    place.clean()
    return record, rejected
