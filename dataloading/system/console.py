"""Lines and bars for whoever watches. Nobody has to: no work ends with the reader of its output.

A reader that left (`| head`), a closed terminal and a full disk behind `>` are all the same here: what cannot be
written is dropped, for the rest of the process and also for others who print.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

from tqdm import tqdm


class Unheard:
    """A stream, or None as Python has it for a closed one, that may fail: what cannot be written is dropped.

    Letters that its encoding lacks are escaped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write as far as that is possible."""
        if self._stream is not None:
            encoding = self._stream.encoding or "utf-8"
            with self._failing():
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Flush as far as that is possible."""
        if self._stream is not None:
            with self._failing():
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the second of one closed meanwhile
            lost, self._stream = self._stream, None
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                # Python flushes what is left once more when it ends, and would end with status 120.
                os.dup2(nowhere.fileno(), lost.fileno() if lost else -1)


def say(text: str, stream: TextIO | None = None, *, end: str = "\n") -> None:
    """Print to `stream` (None: stdout) and flush, where somebody listens."""
    print(text, end=end, file=Unheard(sys.stdout if stream is None else stream), flush=True)


def progress_bar(total: int, *, unit: str, desc: str, disable: bool) -> "tqdm[NoReturn]":
    """A bar on standard error, where somebody listens."""
    stream: Any = Unheard(sys.stderr)
    return tqdm(total=total, unit=unit, desc=desc, disable=disable, mininterval=0.5, file=stream)
