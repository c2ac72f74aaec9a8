"""Processes that make the items of an endless series ahead of need: worker w of W makes items w, w + W, ...

Not torch's DataLoader. Its batches pass through /dev/shm, which containers keep at 64 MB, here through anonymous shared
memory made before the fork; its errors are tracebacks within tracebacks; its workers outlive a parent that was killed
while they stood at a full pipe, and one that is stopped keeps its parent from ending. These hold nothing worth saving,
so they are killed: by `close`, and by the kernel when their parent dies, however it does.

Each worker has a socket to its parent: it writes a frame an item, and is at most `ahead` items beyond the bytes that
the parent sends, one for each item it took.
"""

import atexit
import contextlib
import errno
import gc
import mmap
import multiprocessing
import multiprocessing.util
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DataError
from .parent import die_with_parent
from .waiting import wait_for

T = TypeVar("T")
Slot = NDArray[np.uint8]
"""Memory that a worker fills for its parent."""

_HEADER = struct.Struct("<Q?")  # bytes that follow; whether they are an error
_STOP_SIGNALS = {
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
}  # fmt: skip
"""What terminals, queues and launchers send to every process of a job to stop it."""
_STATES = {
    "T": "is stopped (by SIGSTOP, a debugger or a frozen container); kill -CONT {pid} lets it go on",
    "t": "is stopped by a debugger",
    "D": "waits for the disk or the network store that holds the data; is it reachable and fast enough?",
    "Z": "has died",
}
_SIGNALS = {
    signal.SIGKILL: "most often the kernel's out-of-memory killer (dmesg tells): use fewer --num-workers, a smaller "
    "--global-batch-size or --micro-batch, or more memory",
    signal.SIGBUS: "memory or a file it had mapped was taken away: a full or tiny memory limit, a damaged disk",
    signal.SIGSEGV: "a decoder crashed; --num-workers 0 shows where",
}


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    socket: socket.socket
    slots: list[Slot]


class Workers:
    """`count` processes that make items from number `first` on.

    make: called in a worker with an item's number and the slot to fill, (slot_bytes,) uint8; returns the rest of the
    item as bytes. ahead: items that each worker has ready. stall_seconds: how long `take` waits, 0 without end. name:
    of an item, for messages.

    Create it in the main thread: Linux ends workers with the thread that forked them, elsewhere they end with the next
    item they make.
    """

    def __init__(
        self,
        make: Callable[[int, Slot], bytes],
        *,
        first: int,
        count: int,
        ahead: int,
        slot_bytes: int,
        stall_seconds: float,
        name: Callable[[int], str] = "step {}".format,
    ):
        self.next, self.ahead, self.stall_seconds, self.name = first, ahead, stall_seconds, name
        self._first, self._pid = first, os.getpid()
        self._workers: list[_Worker] = []
        _living.add(self)
        try:
            for w in range(count):
                self._workers.append(self._start(make, w, count, slot_bytes))
        except BaseException:
            self.close()
            raise

    def _start(self, make: Callable[[int, Slot], bytes], w: int, count: int, slot_bytes: int) -> _Worker:
        try:
            memory = mmap.mmap(-1, self.ahead * slot_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"data worker {w + 1} of {count}: no {self.ahead * slot_bytes / 1e6:.0f} MB of memory for its batches "
                f"({error}); use fewer --num-workers or a smaller --global-batch-size or --micro-batch"
            ) from error
        slots = [np.frombuffer(memory, np.uint8, slot_bytes, i * slot_bytes) for i in range(self.ahead)]
        try:
            mine, its = socket.socketpair()
        except OSError as error:
            raise _no_worker(w, count, error) from error
        siblings = [worker.socket for worker in self._workers]
        series = range(self._first + w, sys.maxsize, count)
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(make, series, slots, its, [mine, *siblings], _Parent.of_this_thread()), daemon=True
        )
        # Between the fork and the worker's first lines a signal would run the parent's handler in the worker, and a
        # collection the destructors of the parent's garbage.
        mask, collecting = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS), gc.isenabled()
        gc.disable()
        try:
            process.start()
        except OSError as error:
            mine.close()
            raise _no_worker(w, count, error) from error
        finally:
            its.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if collecting:
                gc.enable()
        return _Worker(process, mine, slots)

    def take(self, unpack: Callable[[bytes, Slot], T]) -> T:
        """The next item: unpack(rest, slot), which copies what it keeps of the slot.

        Raises what `make` raised, and DataError when the worker died or the item does not come in time.
        """
        turn = self.next - self._first
        w, count = turn % len(self._workers), len(self._workers)
        worker = self._workers[w]
        failed, rest = self._receive(worker, f"data worker {w + 1} of {count} (pid {worker.process.pid})")
        if failed:
            raise pickle.loads(rest)
        item = unpack(rest, worker.slots[turn // count % self.ahead])
        with contextlib.suppress(OSError):  # it died after this item, as the wait for its next one will tell
            worker.socket.sendall(b"+")
        self.next += 1
        return item

    def _receive(self, worker: _Worker, name: str) -> tuple[bool, bytes]:
        """A frame: whether it is an error, and its bytes."""
        poll = select.poll()
        poll.register(worker.socket, select.POLLIN)
        frame = bytearray()
        size = _HEADER.size

        def complete(seconds: float) -> bool:
            nonlocal size
            if poll.poll(1000 * seconds):
                try:
                    chunk = worker.socket.recv(size - len(frame))
                except ConnectionResetError:
                    chunk = b""
                if not chunk:
                    raise DataError(f"{self.name(self.next)}: {name} {_death(worker.process)}")
                frame.extend(chunk)
                if len(frame) == _HEADER.size:
                    size += _HEADER.unpack(frame)[0]
            return len(frame) == size > _HEADER.size

        if not wait_for(complete, self.stall_seconds):
            raise DataError(
                f"{self.name(self.next)}: no batch within {self.stall_seconds:g} s (--stall-seconds): "
                f"{name} {_state(worker.process.pid)}"
            )
        return _HEADER.unpack_from(frame)[1], bytes(frame[_HEADER.size :])

    def close(self) -> None:
        """Kill the workers: no other signal ends one that is stopped, and none of them holds anything to be saved."""
        workers, self._workers = self._workers, []
        if os.getpid() != self._pid:  # a fork of the process whose workers they are, which ends or drops its copy
            return
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.socket.close()


_living: "weakref.WeakSet[Workers]" = weakref.WeakSet()


def _end_all() -> None:
    for workers in list(_living):
        workers.close()


# At its exit multiprocessing ends its children by SIGTERM, which workers ignore, and waits for them. Exit functions run
# last registered first: ours before that of multiprocessing.util, which is imported above.
atexit.register(_end_all)


def _no_worker(w: int, count: int, error: OSError) -> DataError:
    limit = " or raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
    return DataError(f"data worker {w + 1} of {count} cannot be started ({error}); lower --num-workers{limit}")


def _death(process: multiprocessing.process.BaseProcess) -> str:
    """How a worker ended that closed its socket."""
    process.join(5)
    code = process.exitcode
    if code is None:
        return "has died (of what is not known, since this process was started with SIGCHLD ignored)"
    if code >= 0:
        return f"ended with status {code}; its last words are above"
    why = _SIGNALS.get(signal.Signals(-code), "it did not end by itself")
    return f"was killed by {signal.Signals(-code).name}: {why}"


def _state(pid: int | None) -> str:
    """What a worker is doing, by Linux's account of it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        letter = ""
    busy = (
        "is still at it: a slow store or a busy machine; raise the limit, or lower --global-batch-size or --micro-batch"
    )
    return _STATES.get(letter, busy).format(pid=pid)


class _Parent(NamedTuple):
    pid: int
    dies_as_one: bool
    """Whether the forking thread lives as long as the process: Linux tells a child of its parent thread's death."""

    @classmethod
    def of_this_thread(cls) -> "_Parent":
        return cls(os.getpid(), threading.current_thread() is threading.main_thread())


def _end_with(parent: _Parent) -> None:
    """Be killed when the parent dies, now if it is dead already."""
    if parent.dies_as_one:
        die_with_parent()
    if os.getppid() != parent.pid:
        os._exit(1)


def _serve(
    make: Callable[[int, Slot], bytes],
    series: range,
    slots: Sequence[Slot],
    its: socket.socket,
    others: Sequence[socket.socket],
    parent: _Parent,
) -> None:
    """A worker's life."""
    # What was garbage in the parent stays so: the destructor of a DALI pipeline waits for threads that no fork has.
    gc.freeze()
    gc.enable()
    # Queues signal every process of a job. A worker that heeded it would fail the run before its checkpoint is written.
    signal.set_wakeup_fd(-1)
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    _end_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    for other in others:  # the parent's ends: held here, they would hide its death
        other.close()
    torch.set_num_threads(1)
    try:
        for i, number in enumerate(series):
            if i >= len(slots) and not its.recv(1):
                return
            try:
                rest, failed = make(number, slots[i % len(slots)]), False
            except Exception as error:
                rest, failed = _pickled(error), True
            its.sendall(_HEADER.pack(len(rest), failed) + rest)
            if failed:
                return
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone


def _pickled(error: Exception) -> bytes:
    """An error of the data as it is; of our own, with the traceback that its parent cannot have."""
    if isinstance(error, ValueError | OSError | MemoryError):
        try:
            data = pickle.dumps(error)
            pickle.loads(data)
            return data
        except Exception:  # whatever a class of errors does in its constructor
            return pickle.dumps(DataError(str(error)))
    return pickle.dumps(RuntimeError(f"in a data worker: {traceback.format_exc()}"))
