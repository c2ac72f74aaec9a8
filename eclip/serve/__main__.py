"""`python -m eclip.serve --index INDEX`: a search page and its API, until it is stopped."""

import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from eclip.dataloading.images import MAX_PIXELS
from eclip.presets import one_line_errors
from eclip.serve.guard import hostname
from eclip.serve.limits import LOCAL, MEGABYTE, Limits

_BACKLOG = 2048
_STOPPING = 10  # seconds that requests under way have to be answered


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A page to search an index with, and its API. Stop it with Ctrl-C."""

    index: str
    """What eclip embed wrote: a folder, or an address that LanceDB knows."""
    model: Path | None = None
    """The model, where it is not the one at the place that the index names."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0 is every network of this machine. There is no login: whoever gets there may search."""
    port: int = 8000
    """0 takes a free one."""
    allow_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """A name under which a browser or a proxy asks (the Host header), given once for each: without it a server on
    127.0.0.1 answers to localhost alone, and another one to every name."""
    max_upload_mb: float = 20
    """Of a request. Larger ones are refused unread."""
    max_megapixels: float = 50
    """Of a photo."""
    timeout: float = 30
    """Seconds that a request may take, from its last byte to its answer."""
    batch: int = 32
    """Questions that the model takes together; 1 asks them one by one."""
    batch_window: float = 0
    """Milliseconds to wait for more questions while the model is idle. What arrives while it is busy is batched
    anyway."""
    quiet: bool = False
    """No line for each request."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: use 0 to 65535")
        if not self.host:
            raise ValueError("--host is empty: use 127.0.0.1, or 0.0.0.0 for every network")
        for name in ("max_upload_mb", "max_megapixels", "timeout", "batch"):
            if not 0 < getattr(self, name) < 1e6:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"{flag}: use more than 0 and less than a million")
        if self.max_megapixels > MAX_PIXELS / 1e6:
            given, most = f"--max-megapixels {self.max_megapixels:g}", f"{MAX_PIXELS / 1e6:g}"
            raise ValueError(f"{given}: nothing above {most} is decoded; use {most} at most")
        for name in self.allow_host:
            if not hostname(name):
                raise ValueError(f"--allow-host {name!r}: a name is wanted, such as shop.example, without http://")
        if not 0 <= self.batch_window <= 1000:
            raise ValueError(f"--batch-window {self.batch_window}: use 0 to 1000 milliseconds")

    @property
    def limits(self) -> Limits:
        """What a client may ask for."""
        upload = int(self.max_upload_mb * MEGABYTE)
        held = max(Limits.held_bytes, 4 * upload)
        pixels = int(self.max_megapixels * 1e6)
        return Limits(upload_bytes=upload, held_bytes=held, pixels=pixels, seconds=self.timeout)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.serve") -> None:
    """Serve until a signal; exits with 2 for flags that mean nothing, with 1 for what cannot be served."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog=prog, args=argv)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("eclip.serve").setLevel(logging.WARNING if arguments.quiet else logging.INFO)
    # Whatever loading does, a stop is a stop; uvicorn has handlers of its own while it serves.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        serve(arguments)
    except KeyboardInterrupt:
        print("error: stopped (Ctrl-C) before it listened", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def serve(arguments: Arguments) -> None:
    """Load, listen, and return when a signal has stopped it.

    Raises ValueError for what cannot be served, before anything is listened to.
    """
    uvicorn = _uvicorn()
    from eclip.search.query import Searcher
    from eclip.serve.app import create_app
    from eclip.serve.service import Service

    # The port first, which is quick to tell; nobody is let in before listen().
    listener = _bind(arguments.host, arguments.port)
    with listener:
        searcher = Searcher.open(arguments.index, arguments.model, arguments.device)
        service = Service(searcher, arguments.limits, batch=arguments.batch, window=arguments.batch_window / 1000)
        try:
            app = create_app(service, hosts=_hosts(arguments))
            config = uvicorn.Config(
                app, backlog=_BACKLOG, log_config=None, access_log=False, server_header=False, lifespan="off",
                timeout_graceful_shutdown=_STOPPING, log_level="error",
            )  # fmt: skip
            server = uvicorn.Server(config)
            listener.listen(_BACKLOG)  # whoever asks from here on is answered
            _say_where(arguments, listener, service.health())
            # uvicorn raises the signal that stopped it again, for whoever was there before it: nobody.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)
            server.run(sockets=[listener])
        finally:
            service.close()
    print("stopped", flush=True)


def _uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import lancedb  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f'eclip serve needs the package {error.name}: pip install -e ".[serve]"') from None
    return uvicorn


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen yet. Raises ValueError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host}: no address of this machine ({error})") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(f"--port {port} of {host}: {error.strerror}; take another one, or --port 0") from None
    return listener


def _hosts(arguments: Arguments) -> set[str] | None:
    named = {hostname(name) for name in arguments.allow_host}
    if arguments.host in LOCAL:
        return {*LOCAL, *named}
    return {*LOCAL, *named} if named else None


def _say_where(arguments: Arguments, listener: socket.socket, health: dict[str, Any]) -> None:
    host, port = listener.getsockname()[:2]
    if arguments.host not in LOCAL:
        print(f"warning: --host {arguments.host}: no login; whoever reaches this port may search", file=sys.stderr)
    shown = f"[{host}]" if ":" in host else host
    held = f"{health['products']} products, {health['rows']} images"
    print(f"{held} of {arguments.index}: http://{shown}:{port} (API: /docs); Ctrl-C stops it", flush=True)


if __name__ == "__main__":
    main()
