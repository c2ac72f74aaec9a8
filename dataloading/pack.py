"""Write WebDataset shards: `<split>-000000.tar` ... with `<key>.json` and `<key>.000.jpg`, ... for each product.

`write_shards` is the format. The command packs a user's own catalogue, a table and a folder of images:

    python -m eclip.dataloading.pack --table catalog.csv --images photos --out data/shop --val 0.05 --test 0.05

The table is CSV or TSV with a header, or JSON lines; a product's rows need not stand together. Required columns:
`product`, `title`, `category`, `image` (path below the image folder; several separated by `|`, in JSON lines also a
list). Read when present: `sku`, `source` (detail, customer, ad), `catalog`, `title_<language>`, `attribute_<name>`.

Every image is decoded in full, since one that cannot be decoded costs much more during training; what is left out is
counted and listed with its reason in `rejected.jsonl`. EXIF orientation is baked in and the short side reduced: a
320 px JPEG decodes three times as fast as a 1 MP one and holds all that 224 px crops can use.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import tarfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from .schema import SOURCES, ImageRecord, Product

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # USTAR names end at 100 bytes
_MIN_SIDE = 32
_MAX_PIXELS = 80_000_000  # 240 MB as RGB; beyond it Pillow suspects a decompression bomb


def image_name(number: int) -> str:
    """Name of a product's image in its shard, without the key: "000.jpg"."""
    return f"{number:03d}.jpg"


def _check(product: Product, images: Sequence[bytes], seen: set[str]) -> None:
    key = product.key
    if not _KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: expected 1 to 80 letters, digits, '-' or '_' (in a tar a dot ends the key)")
    if key in seen:
        raise ValueError(f"key {key!r} occurs twice; keys are unique within a split")
    if len(images) != len(product.images) or not images:
        raise ValueError(f"{key}: {len(images)} images for {len(product.images)} records; give at least one, one each")
    for number, record in enumerate(product.images):
        if record.file != image_name(number):
            raise ValueError(f"{key}: record {number} is called {record.file!r}; expected {image_name(number)!r}")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # mtime, owner and mode stay constant: equal content gives equal bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return 512 + -(-len(data) // 512) * 512


def write_shards(
    products: Iterable[tuple[Product, list[bytes]]], data_dir: Path, split: str, *, max_bytes: int = 256 << 20
) -> list[Path]:
    """Write products with their encoded images to `data_dir/<split>-NNNNNN.tar`, starting a new tar at `max_bytes`.

    The image files of a product must be named image_name(0), image_name(1), ... in its records. Tars get their names
    when all are complete; only then older shards of the split and its index are removed. Returns the tars in order.
    Raises ValueError for bad keys, for records that do not match the images, and when there is no product.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    written: list[Path] = []
    tar: tarfile.TarFile | None = None
    size = 0
    try:
        for product, images in products:
            _check(product, images, seen)
            seen.add(product.key)
            payload = product.to_json()
            need = sum(map(len, images)) + len(payload)
            if tar is None or size + need > max_bytes:
                if tar is not None:
                    tar.close()
                written.append(data_dir / f"{split}-{len(written):06d}.tar.part")
                tar, size = tarfile.open(written[-1], "w", format=tarfile.USTAR_FORMAT), 0  # noqa: SIM115
            size += _add(tar, f"{product.key}.json", payload)
            for number, data in enumerate(images):
                size += _add(tar, f"{product.key}.{image_name(number)}", data)
        if tar is None:
            raise ValueError(f"no product for split {split!r} of {data_dir}: nothing was written")
        tar.close()
    except BaseException:
        if tar is not None:
            tar.close()
        for part in written:
            part.unlink(missing_ok=True)
        raise
    for old in [*data_dir.glob(f"{split}-[0-9]*.tar"), data_dir / f"{split}.index.npz"]:
        old.unlink(missing_ok=True)
    return [part.rename(part.with_suffix("")) for part in written]


def encode_image(path: Path, *, short_side: int = 320, quality: int = 90) -> tuple[bytes, int, int]:
    """Decode an image in full and encode it again as RGB JPEG, upright, its short side at most `short_side` pixels.

    Transparent pixels become white; of an animation the first frame is kept. Returns the JPEG, its width and height.
    Raises ValueError with the reason when the image cannot be used.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise ValueError(f"more than {_MAX_PIXELS // 10**6} megapixels")
            opened.load()
            picture: Image.Image = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"pixel format {picture.mode}: convert to 8 bits a channel first")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError("file not found") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {_MAX_PIXELS // 10**6} megapixels") from None
    except (OSError, SyntaxError, EOFError) as error:  # Pillow raises SyntaxError for some broken PNGs
        raise ValueError(f"cannot be decoded: {str(error).replace(str(path), path.name)}") from None
    if min(picture.size) < _MIN_SIDE:
        raise ValueError(f"{picture.width} x {picture.height} px: smaller than {_MIN_SIDE} px")
    scale = short_side / min(picture.size)
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue(), picture.width, picture.height


@dataclass(frozen=True)
class Rejection:
    """A row or an image that was left out, and why."""

    where: str
    reason: str


@dataclass
class PackReport:
    """What `pack_catalog` wrote and what it left out."""

    products: Counter[str] = field(default_factory=Counter)
    """By split."""
    images: int = 0
    rejected: list[Rejection] = field(default_factory=list)


@dataclass
class _Draft:
    """A product gathered from its rows; images are (path, sku, source, title)."""

    product: Product
    images: list[tuple[str, str, str, str]] = field(default_factory=list)


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .csv, .tsv or .jsonl table as dictionaries. Raises ValueError for other kinds and for broken lines."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: expected a table ending in .csv, .tsv or .jsonl")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if kind != ".jsonl":
            yield from csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",")
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object")
            yield row


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _key(product: str) -> str:
    """The product's id where it can be a key, else its readable part and a hash."""
    if _KEY.fullmatch(product):
        return product
    digest = hashlib.blake2b(product.encode(), digest_size=6).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', product)[:60]}-{digest}"


def _prefixed(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in row.items() if k and k.startswith(prefix) and v not in (None, "")}


def _gather(table: Path, rejected: list[Rejection]) -> list[_Draft]:
    drafts: dict[str, _Draft] = {}
    for number, row in enumerate(read_table(table), start=1):
        where, name = f"{table.name}, row {number}", _text(row, "product")
        paths = row.get("image") or []
        paths = [str(p) for p in paths] if isinstance(paths, list) else str(paths).split("|")
        paths = [p.strip() for p in paths if p.strip()]
        missing = [c for c in ("product", "title", "category") if not _text(row, c)] + ([] if paths else ["image"])
        source = _text(row, "source") or "detail"
        category = _text(row, "category")
        if missing:
            rejected.append(Rejection(where, f"no {missing[0]}"))
        elif source not in SOURCES:
            rejected.append(Rejection(where, f"unknown source (known: {', '.join(SOURCES)})"))
        elif name in drafts and drafts[name].product.category != category:
            rejected.append(Rejection(where, "category differs from that of the product's first row"))
        else:
            if name not in drafts:
                product = Product(
                    key=_key(name),
                    product=name,
                    title=_text(row, "title"),
                    category=category,
                    catalog=_text(row, "catalog") or name,
                    titles={k: str(v) for k, v in _prefixed(row, "title_").items()},
                    attributes=_prefixed(row, "attribute_"),
                )
                drafts[name] = _Draft(product)
            drafts[name].images += [(p, _text(row, "sku") or name, source, _text(row, "title")) for p in paths]
    return list(drafts.values())


def _split_of(catalog: str, val: float, test: float) -> str:
    """A fixed function of the catalog id: products of one catalog entry stay together, and stay when others come."""
    digest = hashlib.blake2b(catalog.encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "little") / 2**64
    return "test" if position < test else "val" if position < test + val else "train"


def pack_catalog(
    table: Path,
    images: Path,
    data_dir: Path,
    *,
    val: float = 0.0,
    test: float = 0.0,
    short_side: int = 320,
    quality: int = 90,
    workers: int = 4,
    progress: bool = True,
) -> PackReport:
    """Pack a catalogue (see the module's docstring) into `data_dir`, split by catalog id.

    val, test: shares of the catalog entries. workers: decoding threads. Writes `rejected.jsonl` beside the shards when
    something was left out. Raises ValueError when the table cannot be read or a split would be empty.
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise ValueError(f"val={val}, test={test}: expected shares of at least 0 with a sum below 1")
    if short_side < _MIN_SIDE or not 1 <= quality <= 95 or workers < 1:
        given = f"short_side={short_side}, quality={quality}, workers={workers}"
        raise ValueError(f"{given}: expected at least {_MIN_SIDE}, 1 to 95, at least 1")
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder of images")
    report = PackReport()
    drafts = _gather(table, report.rejected)
    root = images.resolve()

    def encode(draft: _Draft) -> tuple[Product, list[bytes], list[Rejection]]:
        records: list[ImageRecord] = []
        encoded: list[bytes] = []
        rejected: list[Rejection] = []
        for name, sku, source, title in draft.images:
            try:
                path = (root / name).resolve()
                if not path.is_relative_to(root):
                    raise ValueError("outside the image folder")
                data, width, height = encode_image(path, short_side=short_side, quality=quality)
            except ValueError as error:
                rejected.append(Rejection(name, str(error)))
                continue
            file = image_name(len(records))
            records.append(ImageRecord(file=file, source=source, sku=sku, title=title, width=width, height=height))
            encoded.append(data)
        skus: dict[str, dict[str, Any]] = {r.sku: {} for r in records}
        fields = {**vars(draft.product), "images": tuple(records), "skus": skus}
        return Product(**fields), encoded, rejected

    def packed(split: str, bar: "tqdm[None]") -> Iterator[tuple[Product, list[bytes]]]:
        waiting: deque[Future[tuple[Product, list[bytes], list[Rejection]]]] = deque()
        mine = (d for d in drafts if _split_of(d.product.catalog, val, test) == split)
        with ThreadPoolExecutor(workers) as pool:  # Pillow decodes without holding the interpreter lock
            while True:
                while len(waiting) < 4 * workers and (draft := next(mine, None)) is not None:
                    waiting.append(pool.submit(encode, draft))
                if not waiting:
                    return
                product, encoded, rejected = waiting.popleft().result()
                bar.update()
                report.rejected += rejected
                if encoded:
                    report.products[split] += 1
                    report.images += len(encoded)
                    yield product, encoded
                else:
                    report.rejected.append(Rejection(product.product, "product without a usable image"))

    with tqdm(total=len(drafts), unit="product", desc="packing", disable=not progress, mininterval=0.5) as bar:
        for split, share in (("train", 1.0), ("val", val), ("test", test)):
            if share > 0:
                write_shards(packed(split, bar), data_dir, split)
    listing = data_dir / "rejected.jsonl"
    listing.unlink(missing_ok=True)
    if report.rejected:
        listing.write_text("".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in report.rejected))
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `pack_catalog`."""
    parser = argparse.ArgumentParser(
        prog="python -m eclip.dataloading.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", type=Path, required=True, help=".csv, .tsv or .jsonl, one row an image or a product")
    add("--images", type=Path, required=True, help="folder the table's image paths start from")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--val", type=float, default=0.0, help="share of the catalog entries for val (default: %(default)s)")
    add("--test", type=float, default=0.0, help="share of the catalog entries for test (default: %(default)s)")
    add("--short-side", type=int, default=320, help="largest short side, pixels (default: %(default)s)")
    add("--quality", type=int, default=90, help="JPEG quality (default: %(default)s)")
    add("--workers", type=int, default=4, help="decoding threads (default: %(default)s)")
    add("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    try:
        report = pack_catalog(
            args.table,
            args.images,
            args.out,
            val=args.val,
            test=args.test,
            short_side=args.short_side,
            quality=args.quality,
            workers=args.workers,
            progress=not args.no_progress,
        )
    except ValueError as error:
        parser.error(str(error))
    counts = ", ".join(f"{split} {n}" for split, n in report.products.items())
    print(f"{args.out}: products {counts}; {report.images} images; {len(report.rejected)} rejected")
    for reason, count in Counter(r.reason for r in report.rejected).most_common():
        print(f"  {count} x {reason}")


if __name__ == "__main__":
    main()
