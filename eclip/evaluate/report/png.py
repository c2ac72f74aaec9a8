"""Pictures as files."""

import io
from pathlib import Path

from PIL import Image

from eclip.files import replace_bytes


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all. Raises CannotWrite."""
    content = io.BytesIO()
    image.save(content, "PNG")
    replace_bytes(path, content.getvalue())
