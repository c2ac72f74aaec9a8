"""What the commands of this folder share: a refusal is one line, and a signal ends them after they cleaned up.

Nobody need listen: a reader that left (`| head`), a closed terminal or a full disk under the output stops no work.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""A scheduler's and a closed terminal's way to end a command."""
_PR_SET_PDEATHSIG = 1


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        """End the command with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception, so that what is half done is undone on the way out."""

    number = signal.SIGTERM


class HungUp(Terminated):
    """SIGHUP: the terminal was closed."""

    number = signal.SIGHUP


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


def say(line: str) -> None:
    """Print a line where somebody listens."""
    print(line, file=Unheard(sys.stdout), flush=True)


def progress_bar(total: int, *, unit: str, desc: str, disable: bool) -> "tqdm[NoReturn]":
    """A bar on standard error, where somebody listens."""
    stream: Any = Unheard(sys.stderr)
    return tqdm(total=total, unit=unit, desc=desc, disable=disable, mininterval=0.5, file=stream)


def die_with_parent() -> None:
    """Have this process killed when the one that started it is: on Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _terminate(number: int, frame: FrameType | None) -> None:
    for ending in _ENDINGS:
        signal.signal(ending, signal.SIG_IGN)  # once: the clean-up is not to be interrupted
    raise HungUp if number == signal.SIGHUP else Terminated


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn ValueError and OSError into one line and exit status 1, SIGTERM into 143, SIGHUP 129 and Ctrl-C 130.

    For the main thread of a command. What is ignored (SIGHUP under nohup) stays so.
    """
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _terminate)
    try:
        yield
    except (ValueError, OSError) as error:
        _end(f"{prog}: error: {error}", 1)
    except KeyboardInterrupt as stop:
        ending = stop.number if isinstance(stop, Terminated) else signal.SIGINT
        name = "Ctrl-C" if ending == signal.SIGINT else ending.name
        _end(f"{prog}: {str(stop) or 'stopped'} ({name})", 128 + ending)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _end(line: str, status: int) -> NoReturn:
    print(" ".join(line.splitlines()), file=Unheard(sys.stderr), flush=True)
    raise SystemExit(status)
