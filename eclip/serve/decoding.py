"""Photos decoded in processes that can be killed: one that hangs, crashes or takes too much memory ends alone."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np
import torch

from eclip.dataloading.schema import Box
from eclip.inference.pictures import Pixels
from eclip.serve.limits import Limits, Refusal, busy

WORKER = "from eclip.serve.decode_worker import main"
"""What a process runs: it defines `main`."""


class DecodePool:
    """Processes that decode, and a thread for each that waits for it."""

    def __init__(self, size: int, limits: Limits, *, workers: int = 2, program: str = WORKER) -> None:
        """size: S, of the model's square. workers: processes; each takes 30 MB, and what a photo needs."""
        self._size, self._limits, self._program = size, limits, program
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._lock, self._open, self._closed = threading.Lock(), 0, False
        self._all: set[_Process] = set()
        for _ in range(workers):
            self._idle.put(self._start())

    def decode(self, data: bytes, box: Box | None = None, *, margin: float = 0.0) -> "Future[Pixels]":
        """The bytes of a file, or a box of that photo, to what the model sees of it.

        Raises Refusal: 503 when too many wait, and in the future 413 for too many pixels, 422 for a damaged photo, a
        box outside of it, or one that takes too long.
        """
        with self._lock:
            if self._open >= self._limits.pending:
                raise busy(f"{self._limits.pending} photos wait already")
            self._open += 1
        future = self._threads.submit(self._decode, data, box, margin)
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()
            self._all.clear()

    @property
    def processes(self) -> list[int]:
        """Ids of the processes."""
        with self._lock:
            return [process.pid for process in self._all]

    def _done(self, _: object) -> None:
        with self._lock:
            self._open -= 1

    def _start(self) -> "_Process":
        with self._lock:
            if self._closed:
                raise busy("it is being stopped")
            process = _Process(self._program)
            self._all.add(process)
        return process

    def _replace(self, process: "_Process") -> "_Process":
        process.kill()
        with self._lock:
            self._all.discard(process)
        return self._start()

    def _decode(self, data: bytes, box: Box | None, margin: float) -> Pixels:
        limits = self._limits
        asked = {"size": self._size, "box": box, "margin": margin, "pixels": limits.pixels}
        line = json.dumps({**asked, "seconds": limits.decode_seconds}).encode()
        process = self._idle.get()
        try:
            if process.ended:
                process = self._replace(process)
            reply = process.ask(line + b"\n" + data, limits.decode_seconds)
        except TimeoutError:
            process = self._replace(process)
            raise Refusal(422, f"photo: not decoded within {limits.decode_seconds:g} s") from None
        except (EOFError, OSError):
            process = self._replace(process)
            raise Refusal(422, "photo: its decoder crashed or ran out of memory; send it as a plain JPEG") from None
        finally:
            self._idle.put(process)
        told, _, pixels = reply.partition(b"\n")
        answer = json.loads(told)
        if "error" in answer:
            raise Refusal(413 if answer["large"] else 422, f"photo: {answer['error']}")
        square = np.frombuffer(bytearray(pixels), np.uint8).reshape(self._size, self._size, 3)
        return Pixels(torch.from_numpy(square.transpose(2, 0, 1).copy()), (answer["width"], answer["height"]))


class _Process:
    """A process of `decode_worker`, and the socket to it."""

    def __init__(self, program: str) -> None:
        ours, theirs = socket.socketpair()
        # Its own import path is ours; a session of its own keeps Ctrl-C of the terminal from it.
        code = f"import sys; sys.path[:] = {sys.path!r}; {program}; main({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def ask(self, message: bytes, seconds: float) -> bytes:
        """Raises TimeoutError, and EOFError or OSError when the process is gone."""
        timer = threading.Timer(seconds, self._process.kill)  # sending blocks, too, when nobody reads
        timer.start()
        try:
            self._connection.send_bytes(message)
            return self._connection.recv_bytes(1 << 26)
        except (EOFError, OSError):
            if not timer.is_alive():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            timer.join()

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
