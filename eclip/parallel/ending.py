"""How a run ends before its end: which line is printed, by which rank, and with which exit status.

Of many ranks the first that fails speaks, in one line, and torchrun's summary ends with that line; the others leave
without a word, whether they failed in the same way or because that one left.
"""

import contextlib
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from eclip.dataloading.system.console import say
from eclip.parallel.signals import Stopped, StopSignals, signal_name
from eclip.parallel.torchrun import find_place, restart_is_left, stopped_status, write_error_file
from eclip.parallel.watch import PeerFailed, Watch, write_peer_error

T = TypeVar("T")

# What gloo, NCCL and the store say when a peer is gone, in errors of many types.
_LOST = re.compile(
    r"gloo/transport|NCCL|nccl|TCPStore|Connection (closed|reset|refused)|Broken pipe|"
    r"connection (closed|reset)|failed to (send|recv)"
)
_TELL_SECONDS = 10.0  # for a peer that is failing to say why; one that has left has said it before
_AGREE_SECONDS = 2.0
_SILENT_SECONDS = 2.5  # living ranks give a sign of life a second
_YIELD_SECONDS = 0.5  # what is wrong on all ranks alike is for rank 0 to say


def conclude(
    error: BaseException,
    watch: Watch | None,
    stop: StopSignals,
    *,
    told: tuple[type[BaseException], ...],
    stopped: str,
    goes_on: str = "--resume continues it from the newest checkpoint",
) -> int:
    """Say once why the run ends; the exit status of this process.

    told: errors whose message says all a user needs. stopped: what a stop signal interrupted. goes_on: how a run whose
    ranks lost each other is continued, where torchrun does not. Raises `error` itself when it is neither and this
    process is alone.
    """
    if watch is None:
        return _conclude_alone(error, told, stopped, speaks=find_place().rank == 0)
    lost = isinstance(error, PeerFailed) or (isinstance(error, Exception) and bool(_LOST.search(str(error))))
    failure = watch.failure(wait=_TELL_SECONDS if isinstance(error, PeerFailed) else 0)
    if failure is not None:
        write_peer_error(failure)
        return 1
    if stop.signum is not None and (lost or isinstance(error, Stopped)):
        if watch.stop_agreed(wait=_AGREE_SECONDS):
            return say_stopped(stop.signum, stopped, speaks=watch.rank == 0)
        lost = True  # torchrun ends the ranks that are left when one was killed
    if lost:
        silent = watch.silent(wait=_SILENT_SECONDS)
        who = f"{watch.name(silent)} left without a word (killed?)" if silent else f"ranks lost each other: {error}"
        if restart_is_left():
            goes_on = "torchrun starts it again"
        return _speak(f"error: {_one_line(who)}; the run stops, {goes_on}", watch)
    if isinstance(error, told):
        return _speak(f"error: {_one_line(str(error))}", watch)
    text = "".join(traceback.format_exception(error))
    return _speak(f"{type(error).__name__}: {_one_line(str(error))}", watch, text)


def _conclude_alone(error: BaseException, told: tuple[type[BaseException], ...], stopped: str, *, speaks: bool) -> int:
    """One process, or ranks that have not found each other."""
    if isinstance(error, Stopped):
        return say_stopped(error.signum, stopped, speaks=speaks)
    if not isinstance(error, told):
        raise error
    line = f"error: {_one_line(str(error))}"
    write_error_file(line)
    say(line, sys.stderr)
    return 1


def _speak(line: str, watch: Watch, text: str | None = None) -> int:
    """Print `line` (or `text`, a traceback) unless another rank has spoken."""
    if watch.rank > 0:
        time.sleep(_YIELD_SECONDS)
    if watch.publish_failure(f"rank {watch.rank}: {line}" if text else line):
        write_error_file(line, traceback=text)
        say(text or line, sys.stderr)
    elif (failure := watch.failure()) is not None:
        write_peer_error(failure)
    return 1


def say_stopped(signum: int, what: str, *, speaks: bool) -> int:
    """The line of a run that stopped by request, from the rank that `speaks`; the exit status of every rank."""
    status = stopped_status(signum)
    note = "" if status else " (exit status 0, so that torchrun does not start it again)"
    line = f"{signal_name(signum)}: {what}{note}"
    write_error_file(line)
    if speaks:
        say(line)
    return status


def once(read: Callable[[], T]) -> T:
    """Call `read`, which may end the process with a message (SystemExit): of many ranks rank 0 alone prints it.

    Ends the process so itself where a launcher's environment does not say which rank this is.
    """
    try:
        place = find_place()
    except ValueError as error:
        say(f"error: {_one_line(str(error))}", sys.stderr)
        raise SystemExit(2) from None
    if place.world_size == 1:
        return read()
    heard, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            return read()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        if place.rank == 0:
            say(heard.getvalue(), sys.stderr if status else sys.stdout, end="")
            if status:
                write_error_file(heard.getvalue().strip())
        elif status:
            time.sleep(_AGREE_SECONDS)  # torchrun ends all ranks with the first that fails: let that be rank 0


def leave(status: int) -> NoReturn:
    """End the process. After a failure of several ranks at once: a process group whose peers are gone may hang or abort
    while it is destroyed, and a data worker while it is joined."""
    say("", end="")
    say("", sys.stderr, end="")
    if status and find_place().world_size > 1:
        os._exit(status)
    sys.exit(status)


def _one_line(text: str) -> str:
    return " ".join(text.split())
