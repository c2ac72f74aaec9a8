"""A process that decodes photos and nothing else: it knows no model, and may be killed at any time.

A photo comes as one JSON line (size, box, margin, pixels, seconds) and the bytes of the file; back goes one JSON line
and the pixels of the square. JSON, not pickle: whoever takes over a decoder by a photo shall not take over the server.
"""

import json
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from eclip.dataloading.images import file_formats, open_image, resize_box, widen

_MEMORY = 2 << 30  # bytes; of a photo of 50 megapixels with transparency a few copies of 200 MB are made


def main(handle: int) -> None:
    """Decode what comes through this file descriptor, a socket's, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    connection = Connection(handle)
    with suppress(EOFError, OSError):
        while True:
            connection.send_bytes(answer(connection.recv_bytes(), decode))


def answer(message: bytes, work: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> bytes:
    """A message's answer, or what is wrong with its photo."""
    line, _, data = message.partition(b"\n")
    asked = json.loads(line)
    _limit_time(asked["seconds"])
    try:
        told, pixels = work(asked, data)
    except ValueError as error:
        told, pixels = {"error": str(error), "large": isinstance(error, TooManyPixels)}, b""
    return json.dumps(told).encode() + b"\n" + pixels


class TooManyPixels(ValueError):
    """A photo has more pixels than this server takes."""


def decode(asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """A photo, or a box of it, to the model's square: as `read_picture` does. Raises ValueError."""
    opened = open_image(data, file_formats())
    width, height = size = opened.size
    if width * height > asked["pixels"]:
        most = asked["pixels"] / 1e6
        raise TooManyPixels(f"{width} x {height} px are more than {most:g} megapixels: make it smaller")
    box = (0.0, 0.0, float(width), float(height))
    if asked["box"] is not None:
        box = widen(asked["box"], size, asked["margin"])
    return {"width": width, "height": height}, resize_box(opened, box, asked["size"]).tobytes()


def _limit_time(seconds: float) -> None:
    """End this process if one photo takes far too long, should nobody be left to kill it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    with suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + 2 * seconds + 2), hard))
