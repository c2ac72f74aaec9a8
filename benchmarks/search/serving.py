"""`python -m benchmarks.search.serving --index INDEX`: what a server answers in a second, for 1, 10 and 100 clients.

The server runs beside the clients, on the loopback device of the same machine, and shares its cores. Each client asks
the next question when it has its answer; questions are titles of the index, or its thumbnails as photos.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

CLIENTS = (1, 10, 100)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask a server of an index."""

    index: str
    questions: int = 300
    """Of each kind and number of clients."""
    batches: tuple[int, ...] = (32, 1)
    """Questions that the model takes together, a server each."""


@contextmanager
def server(index: str, batch: int) -> Iterator[str]:
    """Its address, once it answers; stopped at the end."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "eclip", "serve", "--index", index, "--port", str(port), "--quiet"]
    process = subprocess.Popen([*command, "--batch", str(batch)], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                httpx.get(f"{address}/healthz", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise SystemExit("error: the server did not start") from None
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def questions(index: str, count: int) -> dict[str, list[dict[str, Any]]]:
    """Arguments of `httpx.post` by kind."""
    from eclip.search.query.table import ImageTable

    rows = ImageTable.open(index).scan(["title", "thumbnail"]).to_pylist()
    chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)]
    return {
        "words": [{"json": {"words": row["title"]}} for row in chosen],
        "photo": [{"files": {"photo": row["thumbnail"]}} for row in chosen],
    }


def ask(address: str, asked: Sequence[dict[str, Any]], clients: int) -> tuple[list[float], float]:
    """Seconds of each question, and of all of them."""
    import httpx

    with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=clients)) as client:

        def one(question: dict[str, Any]) -> float:
            began = time.perf_counter()
            client.post(f"{address}/search", **question).raise_for_status()
            return time.perf_counter() - began

        with ThreadPoolExecutor(clients) as pool:
            began = time.perf_counter()
            return list(pool.map(one, asked)), time.perf_counter() - began


def main() -> None:
    arguments = tyro.cli(Arguments)
    asked = questions(arguments.index, arguments.questions)
    print("| question | clients | together, at most | a second | ms, median / 95% |\n|---|---|---|---|---|")
    for batch in arguments.batches:
        with server(arguments.index, batch) as address:
            for kind, bodies in asked.items():
                ask(address, bodies[:20], 4)  # warm
                for clients in CLIENTS:
                    seconds, total = ask(address, bodies, clients)
                    middle, most = 1000 * np.percentile(seconds, [50, 95])
                    rate = len(bodies) / total
                    print(f"| {kind} | {clients} | {batch} | {rate:.1f} | {middle:.0f} / {most:.0f} |", flush=True)


if __name__ == "__main__":
    main()
