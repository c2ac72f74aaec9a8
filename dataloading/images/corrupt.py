"""Whatever goes wrong with one image is a CorruptImageError, with a reason that is one of few sentences.

Pillow's plugins raise struct.error, TypeError, OSError, RuntimeError, AttributeError, MemoryError, SyntaxError and
more, by the kind of damage.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

MAX_PIXELS = 80_000_000  # 240 MB as RGB; from 89.5 million on Pillow suspects a decompression bomb


class CorruptImageError(ValueError):
    """An image that cannot be used. `reason` is one of few sentences; `detail` has numbers and the decoder's words."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both are kept when a worker process pickles the error
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def words(error: BaseException) -> str:
    """An error's text on one line, without addresses of objects, after its type."""
    text = " ".join(str(error).split())
    return type(error).__name__ if not text or " at 0x" in text else f"{type(error).__name__}: {text}"


@contextmanager
def rejecting(reason: str) -> Iterator[None]:
    """Turn whatever is raised inside into a CorruptImageError; KeyboardInterrupt and SystemExit pass."""
    try:
        yield
    except CorruptImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = str(error).partition(" exceeds")[0]  # a limit of Pillow's follows, which is another one
        raise CorruptImageError(_too_large(), size) from error
    except Exception as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise CorruptImageError("truncated" if cut else reason, words(error)) from error


def _too_large() -> str:
    return f"more than {MAX_PIXELS / 1e6:g} megapixels"


def check_pixels(width: int, height: int) -> None:
    """Raise CorruptImageError for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise CorruptImageError(_too_large(), f"{width} x {height} px")
