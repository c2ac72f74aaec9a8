"""What the commands of this folder share: a refusal is one line, and a signal ends them after they cleaned up."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from .console import Unheard

_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""A scheduler's and a closed terminal's way to end a command."""


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
