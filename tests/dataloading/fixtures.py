"""Tiny shards written with PIL and tarfile, apart from pack.py: the reader is tested against an independent writer."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eclip.dataloading.schema import SOURCES


def jpeg(seed: int, width: int = 48, height: int = 40, *, mode: str = "RGB", **options: Any) -> bytes:
    """A smooth random image (bilinear blow-up of 4x4 noise) as JPEG."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def record(p: int, images: int = 6, skus: int = 2, **changes: Any) -> dict[str, Any]:
    """The JSON of product p: images cycle through the sources, then through the SKUs."""
    files = [
        {
            "file": f"{i:03d}.jpg",
            "source": SOURCES[i % 3],
            "sku": f"p{p}-s{i // 3 % skus}",
            "title": f"Title {p} of kind {i % 2}",
        }
        for i in range(images)
    ]
    facts = {"key": f"k{p:03d}", "product": f"p{p}", "title": f"Title {p}", "category": f"cat{p % 3}"}
    return {**facts, "catalog": f"c{p // 2}", "images": files, **changes}


def write_tar(path: Path, samples: Sequence[tuple[str, bytes | None, Mapping[str, bytes]]]) -> None:
    """Samples (key, JSON bytes or None, images by the rest of their name) as a WebDataset tar."""
    with tarfile.open(path, "w") as tar:
        for key, data, images in samples:
            members = ({"json": data} if data is not None else {}) | dict(images)
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def make_split(
    data_dir: Path,
    split: str = "train",
    *,
    products: int = 7,
    images: int = 6,
    tars: int = 2,
    image: Callable[[int, int], bytes] = lambda p, i: jpeg(100 * p + i),
) -> Path:
    """A small split of `products` products over `tars` tars; `image(p, i)` gives the bytes of each image."""
    data_dir.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, products, tars + 1).astype(int)
    for t in range(tars):
        samples = []
        for p in range(bounds[t], bounds[t + 1]):
            files = {f"{i:03d}.jpg": image(p, i) for i in range(images)}
            samples.append((f"k{p:03d}", json.dumps(record(p, images)).encode(), files))
        write_tar(data_dir / f"{split}-{t:06d}.tar", samples)
    return data_dir
