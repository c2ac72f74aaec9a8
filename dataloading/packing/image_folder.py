"""The images that a table names, below one folder, encoded by threads: a fault is a Rejection, never an end."""

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import Rejection
from ..images import CorruptImageError, encode_image

Encoded = tuple[bytes, int, int]
"""A JPEG, its width and height."""
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """A folder of images and how they are encoded. follow_links: also what links point to outside the folder."""

    folder: Path
    follow_links: bool = False
    short_side: int = 320
    quality: int = 90

    def locate(self, name: str) -> Path:
        """The file that a table names, by a path below the folder. Raises CorruptImageError for one outside it."""
        folder, real = os.path.abspath(self.folder), os.path.realpath(self.folder)
        try:
            # A table's text is Unicode and a file's name is bytes: UTF-8, whatever the locale makes of it.
            path = os.path.normpath(os.path.join(folder, os.fsdecode(name.encode("utf-8", "surrogateescape"))))
            target = os.path.realpath(path)
        except ValueError as error:  # NUL, lone surrogates
            raise CorruptImageError("no file can have this name", str(error)) from error
        if not _within(path, folder) and not _within(path, real):
            raise CorruptImageError("outside the image folder")
        if not self.follow_links and not _within(target, real):
            raise CorruptImageError("a link to outside the image folder; allow with --follow-links", f"to {target}")
        return Path(path)

    def encode(self, name: str) -> Encoded | Rejection:
        """The image as JPEG, or why it cannot be used; nothing is raised."""
        try:
            return encode_image(self.locate(name), short_side=self.short_side, quality=self.quality)
        except CorruptImageError as error:
            return Rejection(kind="image", where=name, reason=error.reason, detail=error.detail)
        except Exception as error:  # one image never stops a packing
            detail = f"{type(error).__name__}: {error}"
            return Rejection(kind="image", where=name, reason="cannot be used", detail=detail)

    def encode_all(
        self, items: Iterable[tuple[_Item, Sequence[str]]], pool: ThreadPoolExecutor, *, ahead: int
    ) -> Iterator[tuple[_Item, list[Encoded | Rejection]]]:
        """Each item, in order, with its images encoded; about `ahead` images are in work meanwhile."""
        waiting: deque[tuple[_Item, list[Future[Encoded | Rejection]]]] = deque()
        coming = iter(items)
        while True:
            while sum(len(futures) for _, futures in waiting) < ahead and (item := next(coming, None)) is not None:
                waiting.append((item[0], [pool.submit(self.encode, name) for name in item[1]]))
            if not waiting:
                return
            first, futures = waiting.popleft()
            yield first, [future.result() for future in futures]


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


@contextlib.contextmanager
def decoding_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads (Pillow decodes without holding the interpreter lock); what waits is dropped at the end."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
