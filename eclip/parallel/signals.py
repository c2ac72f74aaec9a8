"""Signals that ask a run to stop: SIGTERM (queues, torchrun), SIGINT (Ctrl-C), SIGHUP (the terminal was closed), and
the warnings of queues: SIGUSR1 (Slurm's --signal=USR1), SIGUSR2 (Grid Engine's -notify), SIGXCPU (PBS, CPU limits).

Before and after the training loop such a signal raises `Stopped` in the main thread. Inside the loop it is only noted,
so that a checkpoint can be written, except in the wait for a batch. Python runs a handler only between two bytecodes
of the main thread; a thread therefore reads every signal as it arrives, and ends a process whose main thread stands in
a call that never returns.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip
_DEMANDS = (signal.SIGTERM, signal.SIGINT)
"""Those that end the process at once when they come again; the others announce one of these."""
LAUNCHER_GONE = signal.SIGPIPE
"""Passed on where no signal came: torchrun was killed, or the store of the ranks went."""
# torchrun and Slurm kill 30 s after SIGTERM.
GRACE_SECONDS = 20.0
# A queue signals every process of a job, and torchrun then passes the signal on: twice, and meant once.
_SAME_REQUEST_SECONDS = 3.0
_TICK = 0.2
_END = bytes([0])  # no signal has the number 0


def signal_name(number: int) -> str:
    """SIGTERM."""
    return "torchrun or its store is gone" if number == LAUNCHER_GONE else signal.Signals(number).name


class Stopped(KeyboardInterrupt):
    """A stop signal came where there is nothing to save. Not an Exception: no handler of bad data may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal_name(signum))
        self.signum = signum


class StopSignals:
    """Context: the first stop signal is a request, a second SIGTERM or SIGINT ends the process at once.

    repeated_by_launcher: take what comes within three seconds of the first for the same request.
    """

    def __init__(self, *, repeated_by_launcher: bool = False) -> None:
        self.signum: int | None = None
        """The signal that asked, also when another rank got it."""
        self.on_request: Callable[[int], None] | None = None
        """Called from a thread when the first signal arrives, whatever the main thread does."""
        self._tolerance = _SAME_REQUEST_SECONDS if repeated_by_launcher else 0.0
        self._raises, self._handled = True, False
        self._lost, self._lost_at = False, 0.0
        self._arrived: float | None = None  # time.monotonic() of the first SIGTERM or SIGINT
        self._unanswered: tuple[int, float] | None = None
        self._nudges = 0
        self._passed: int | None = None

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(_TICK)
        self._writer.setblocking(False)
        self._process = os.getpid()
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in STOP_SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # nohup ignores it
        }
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._take_back
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        sys.unraisablehook = self._previous_hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.send(_END)  # closing does not end the stream while a forked worker holds a copy of the socket
        self._thread.join()
        self._writer.close()
        self._reader.close()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, a signal only sets `signum`; and afterwards too when an error leaves it, which is handled then."""
        before, self._raises = self._raises, False
        yield
        self._raises = before

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal raises Stopped; so does one that was noted before."""
        before, self._raises = self._raises, True
        try:
            if self.signum is not None:
                raise Stopped(self.signum)
            yield
        finally:
            self._raises = before

    def pass_on(self, signum: int) -> None:
        """Another rank got a signal, or LAUNCHER_GONE: do here, from any thread, what a signal would do."""
        if self.signum is None:
            self._passed = signum
            _signal_main_thread(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker has the handler too; its parent tells it what to do
            return
        self._handled = True
        if self.signum is not None and not self._lost:
            return
        self.signum, self._lost = self.signum or self._passed or number, False
        if self._raises:
            raise Stopped(self.signum)

    def _take_back(self, lost: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised in __del__ and in callbacks: a Stopped among that is raised once more."""
        if not isinstance(lost.exc_value, Stopped):
            self._previous_hook(lost)
            return
        self._lost, self._lost_at = True, time.monotonic()
        self._handled = False  # from here on the thread signals the main one

    def _read(self) -> None:
        while True:
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                numbers = b""
            if _END[0] in numbers:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._arrive(number)
            self._end_when_stuck()

    def _arrive(self, number: int) -> None:
        if self._nudges:
            self._nudges -= 1
            return
        now = time.monotonic()
        if self._unanswered is None:
            self._unanswered = (number, now)
            if self.on_request is not None:
                self.on_request(number)
        if number not in _DEMANDS:
            return
        if self._arrived is None:
            self._arrived = now
        elif now - self._arrived >= self._tolerance:
            _leave_at_once(number, "a second time: stopped at once; what the run saved before is whole")

    def _end_when_stuck(self) -> None:
        if self._unanswered is None or self._handled:
            return
        number, since = self._unanswered
        waited = time.monotonic() - max(since, self._lost_at)
        if waited > _TICK:
            # The kernel may have given the signal to another thread, which does not end a wait of the main one.
            self._nudges += 1
            _signal_main_thread(number)
        if waited > GRACE_SECONDS:
            _leave_at_once(
                number,
                f"not answered within {GRACE_SECONDS:g} s (a device, a disk or a peer that hangs): stopped at once; "
                f"what the run saved before is whole",
            )


def _signal_main_thread(number: int) -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _leave_at_once(number: int, why: str) -> None:
    # Not print: the main thread may hold the stream's lock.
    os.write(2, f"{signal_name(number)} {why}\n".encode())
    os._exit(128 + number)
