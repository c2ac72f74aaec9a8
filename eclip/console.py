"""Lines for whoever watches a run. Nobody has to: a run does not end with the reader of its output."""

import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO | None = None, *, end: str = "\n") -> None:
    """Print to `stream` (None: stdout) and flush.

    Once that fails (`| head` has read enough, the terminal is closed, the disk behind `>` is full), what is printed to
    that stream is dropped for the rest of the process, also by others.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        # Not only skipped: what the stream still holds would fail again at exit, which ends with status 120.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
