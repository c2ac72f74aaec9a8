"""Around every route: which hosts are answered, how much is read, what headers go out, errors as JSON, a line of log.

Pure ASGI, no package: `scope`, `receive` and `send` are those of https://asgi.readthedocs.io/en/latest/specs/www.html.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import quote, urlsplit

from eclip.serve.limits import Limits, Refusal, busy

LOG = logging.getLogger("eclip.serve")
HEADERS = (
    # The page needs no other host, ever; thumbnails are its own, photos are drawn into a canvas.
    (b"content-security-policy", b"default-src 'self'; img-src 'self'; object-src 'none'; base-uri 'none'; "
     b"form-action 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip
_LINGER = 5.0  # seconds for a refused upload to end: a connection that is reset may lose the answer on its way

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """Middleware around the whole application."""

    def __init__(self, app: App, *, limits: Limits, hosts: Collection[str] | None) -> None:
        """hosts: names in the Host header that are answered; None: all of them."""
        self.app, self.limits, self.hosts = app, limits, hosts
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        else:
            await self.app(scope, receive, send)

    def check_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse what a page of another site may have a browser send here.

        A name that was pointed at this machine (DNS rebinding) shows in Host, another site's script or form in Origin.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and hostname(host) not in self.hosts:
            name = hostname(host) or host
            raise Refusal(400, f"host {_shown(name)} is not served here; eclip serve --allow-host NAME adds one")
        origin = headers.get(b"origin", b"").decode("latin-1")
        place = origin.partition("://")[2]
        if origin and place.lower() != host.lower() and hostname(place) not in (self.hosts or ()):
            raise Refusal(
                403,
                f"a page of {_shown(origin)} may not ask this server, which is called {_shown(host)} here; behind a "
                f"proxy let it pass Host on, or give eclip serve --allow-host for both names",
            )


class _Exchange:
    """One request and its response."""

    def __init__(self, guard: Guard, scope: Message, receive: Receive, send: Send) -> None:
        self.guard, self.scope, self.limits = guard, scope, guard.limits
        self._receive, self._send = receive, send
        self.started, self.status = time.monotonic(), 0
        self.read, self.ended, self.gone = 0, False, False

    async def run(self) -> None:
        headers = dict(self.scope["headers"])
        try:
            self.guard.check_host(headers)
            self._check_length(headers)
            await self.guard.app(self.scope, self.receive, self.send)
        except Refusal as refusal:
            await self.refuse(refusal)
        except Exception:
            if self.gone:  # in the middle of an upload: there is nobody to tell
                return
            number = secrets.token_hex(4)
            LOG.exception("error %s in %s", number, self._line())
            await self.refuse(Refusal(500, f"an error of the server's; its log has it as {number}"))
        finally:
            self.guard.held -= self.read
            LOG.info("%s %s %d ms", self._line(), self.status or "gone", (time.monotonic() - self.started) * 1000)

    def _line(self) -> str:
        # Quoted again: a path may hold a line break. What is asked by ?... is not logged.
        return f"{self.scope['method']} {quote(self.scope['path'][:200], safe='/%~:@!$&()*+,;=')}"

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"")
        # A server has parsed it before; more digits than 18 are no int that it could have read.
        if length.isdigit() and int(length[:18]) > self.limits.upload_bytes:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the upload is larger than {self.limits.upload_bytes / 1e6:g} MB; send a smaller photo")

    async def receive(self) -> Message:
        """A part of the body, counted; of one that is too large or too slow no more is read."""
        left = self.started + self.limits.upload_seconds - time.monotonic()
        try:
            # Once the body is there, this waits for the client to go.
            message = await (self._receive() if self.ended else asyncio.wait_for(self._receive(), max(left, 0.001)))
        except asyncio.TimeoutError:
            raise Refusal(408, f"the upload took longer than {self.limits.upload_seconds:g} s") from None
        self.gone = message["type"] == "http.disconnect"
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.read += size
            self.guard.held += size
            self.ended = not message.get("more_body", False)
            if self.read > self.limits.upload_bytes:
                raise self._too_large()
            if self.guard.held > self.limits.held_bytes:
                raise busy("others upload photos, too")
        return message

    async def send(self, message: Message) -> None:
        """A part of the response, its headers with ours."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a status and {"error": ...}, if nothing was answered yet."""
        if self.status:
            return
        body = json.dumps({"error": " ".join(refusal.message.split())}).encode()
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
        unread = not self.ended and self.scope["method"] not in ("GET", "HEAD")
        if unread:
            lines["Connection"] = "close"
        encoded = [(name.lower().encode(), value.encode()) for name, value in lines.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body, "more_body": unread})
        if unread:
            await self._drain()
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self) -> None:
        """Drop the rest of the body for a while: the client may read no answer before it has sent everything."""
        deadline = time.monotonic() + _LINGER
        try:
            while (left := deadline - time.monotonic()) > 0:
                message = await asyncio.wait_for(self._receive(), left)
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
        except asyncio.TimeoutError:
            return


def hostname(host: str) -> str:
    """Of a Host header: without its port, and an IPv6 address without its brackets. "" for what is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if "/" not in host else ""
    except ValueError:
        return ""


def _shown(text: str) -> str:
    return repr(text[:100])
