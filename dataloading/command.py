"""What the commands of this folder share: a refusal is one line, and a signal ends them after they cleaned up."""

import argparse
import contextlib
import ctypes
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        """End the command with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception, so that what is half done is undone on the way out."""


def say(line: str) -> None:
    """Print a line whatever the terminal's encoding: letters that it lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def die_with_parent() -> None:
    """Have this process killed when the one that started it is: on Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the clean-up is not to be interrupted
    raise Terminated


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn ValueError and OSError into one line and exit status 1, SIGTERM into 143 and Ctrl-C into 130.

    For the main thread of a command.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except (ValueError, OSError) as error:
        _end(f"{prog}: error: {error}", 1)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        _end(f"{prog}: {stop or 'stopped'} ({'SIGTERM' if terminated else 'Ctrl-C'})", 143 if terminated else 130)
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _end(line: str, status: int) -> NoReturn:
    print(" ".join(line.splitlines()), file=sys.stderr, flush=True)
    raise SystemExit(status)
