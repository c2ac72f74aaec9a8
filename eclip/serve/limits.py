"""How much a client may ask for, and how a request is refused."""

from collections.abc import Mapping
from dataclasses import dataclass

MEGABYTE = 1_000_000
LOCAL = ("localhost", "127.0.0.1", "::1")
"""This machine's names for itself."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of what a request may hold and of what all of them may hold together."""

    upload_bytes: int = 20 * MEGABYTE
    """Of a request's body."""
    held_bytes: int = 256 * MEGABYTE
    """Of all bodies that are being read or worked on."""
    field_bytes: int = 64 * 1024
    """Of a form's field that is no file."""
    fields: int = 64
    located: int = 20
    """Hits of a question that has the words looked for in each: 0.08 s of a core a hit, and the model waits for it."""
    pixels: int = 50_000_000
    """Of a photo: what the cameras of telephones make."""
    photos: int = 32
    texts: int = 256
    characters: int = 1000
    """Of words or a text."""
    hits: int = 100
    rerank: int = 100
    pending: int = 256
    """Questions, or photos, that wait for their turn."""
    seconds: float = 30.0
    """From a request's last byte to its answer."""
    upload_seconds: float = 60.0
    """For a body to arrive."""
    decode_seconds: float = 10.0
    """For one photo to be decoded."""


class Refusal(Exception):
    """A request is answered with this HTTP status and one line."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def busy(what: str) -> Refusal:
    """503: there is more to do than may wait."""
    return Refusal(503, f"the server is busy: {what}; try again in a moment", {"Retry-After": "1"})
