"""The embedded catalogue packed small, and its shards read by tarfile alone."""

import tarfile
from collections import defaultdict
from pathlib import Path

from eclip.dataloading.schema import Product

SMALL = {"image_size": 64, "images_per_product": 6, "limit": 24, "workers": 1, "progress": False}


def read(data_dir: Path, split: str) -> list[tuple[Product, list[bytes]]]:
    """Samples of a split's tars, by tarfile alone."""
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path in sorted(data_dir.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, name = member.name.split(".", 1)
                stream = tar.extractfile(member)
                assert stream is not None
                samples[key][name] = stream.read()
    return [
        (Product.from_json(files.pop("json"), where=key), [files[name] for name in sorted(files)])
        for key, files in samples.items()
    ]
