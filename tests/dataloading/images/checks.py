"""What tests ask of an image: its pixels, or the reason for which it is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eclip.dataloading.images import CorruptImageError, encode_image, upright_rgb


def put(folder: Path, data: bytes, name: str = "image") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pixels(data: bytes) -> np.ndarray:
    """(H, W, 3) of any image's bytes."""
    return np.asarray(upright_rgb(Image.open(io.BytesIO(data))))


def rejected(path: Path) -> CorruptImageError:
    with pytest.raises(CorruptImageError) as error:
        encode_image(path)
    return error.value
