"""The guard around every route, over an application of three lines."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from eclip.serve.guard import App, Guard, Message, Receive, Send, hostname
from eclip.serve.limits import Limits, Refusal

LIMITS = Limits(upload_bytes=1000, held_bytes=1500, upload_seconds=0.2)


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """The size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("nobody is there")
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def fail(scope: Message, receive: Receive, send: Send) -> None:
    raise KeyError("secret words")


async def refuse(scope: Message, receive: Receive, send: Send) -> None:
    raise Refusal(503, "one\nline", {"Retry-After": "1"})


def ask(
    app: App = echo,
    parts: tuple[bytes, ...] = (b"",),
    *,
    method: str = "POST",
    path: str = "/search",
    hosts: tuple[str, ...] | None = ("localhost", "::1"),
    leaves: bool = False,
    stalls: bool = False,
    read: list[int] | None = None,
    guard: Guard | None = None,
    query_string: bytes = b"",
    **headers: str,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of one request; parts: of its body; then the client may leave or stall."""
    sent: list[Message] = []
    chunks: Iterator[tuple[int, bytes]] = iter(enumerate(parts))

    async def receive() -> Message:
        number, body = next(chunks, (-1, b""))
        if stalls and number < 0:
            await asyncio.sleep(10)
        if number < 0:
            return {"type": "http.disconnect"}
        if read is not None:
            read.append(len(body))
        return {"type": "http.request", "body": body, "more_body": leaves or stalls or number + 1 < len(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    told = {"host": "localhost:8000", **headers}
    scope = {
        "type": "http",
        "method": method,
        "query_string": query_string,
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in told.items()],
    }
    guard = guard or Guard(app, limits=LIMITS, hosts=hosts)
    asyncio.run(guard(scope, receive, send))
    assert guard.held == 0
    if not sent:
        return 0, {}, None
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[-1].get("more_body", False) is False
    body = b"".join(message.get("body", b"") for message in sent[1:])
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, json.loads(body)


def test_what_is_allowed_passes_with_headers_for_a_browser() -> None:
    status, headers, body = ask(parts=(b"x" * 600, b"y" * 400))
    assert (status, body) == (200, 1000)
    assert headers["x-own"] == "1" and headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]


def test_a_large_upload_is_refused_by_its_length_or_where_it_grows_too_large() -> None:
    read: list[int] = []
    status, headers, body = ask(parts=(b"x",), content_length="200000000", read=read)
    assert (status, headers["connection"]) == (413, "close")
    assert body == {"error": "the upload is larger than 0.001 MB; send a smaller photo"}
    assert ask(parts=(b"x" * 600,) * 20)[0] == 413
    assert ask(parts=(b"x",), content_length="9" * 4000)[0] == 413


def test_all_uploads_together_are_bounded() -> None:
    guard = Guard(echo, limits=LIMITS, hosts=None)
    guard.held = 1000

    async def others_end(scope: Message, receive: Receive, send: Send) -> None:
        try:
            await echo(scope, receive, send)
        finally:
            guard.held -= 1000

    guard.app = others_end
    status, headers, body = ask(parts=(b"x" * 600,), guard=guard)
    assert (status, headers["retry-after"]) == (503, "1") and "busy" in body["error"]


def test_a_slow_upload_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eclip.serve.guard._LINGER", 0.1)
    status, _, body = ask(parts=(b"x",), stalls=True)
    assert (status, body) == (408, {"error": "the upload took longer than 0.2 s"})


@pytest.mark.parametrize(
    "host, origin, status",
    [
        ("localhost:8000", "", 200),
        ("LOCALHOST", "http://localhost:8000", 200),
        ("[::1]:8000", "", 200),
        ("shop.example", "", 400),
        ("localhost.evil.example", "", 400),
        ("", "", 400),
        ("[::1", "", 400),
        ("localhost:8000", "http://evil.example", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "http://[", 403),
    ],
)
def test_hosts_and_other_sites(host: str, origin: str, status: int) -> None:
    assert ask(host=host, **({"origin": origin} if origin else {}))[0] == status


def test_the_name_that_a_refusal_shows_is_the_one_to_allow() -> None:
    _, _, body = ask(host="shop.example:8000")
    name = body["error"].split("'")[1]
    assert ask(host="shop.example:8000", hosts=(hostname(name),))[0] == 200
    assert [hostname(text) for text in ("shop.example:80", "[::1]", "https://x", "")] == ["shop.example", "::1", "", ""]


def test_every_host_where_all_are_served_but_not_other_sites_pages() -> None:
    assert ask(host="shop.example", hosts=None)[0] == 200
    assert ask(host="shop.example", origin="https://shop.example", hosts=None)[0] == 200
    assert ask(host="shop.example", origin="https://evil.example", hosts=None)[0] == 403


def test_an_error_of_ours_is_a_number_for_the_client_and_a_traceback_for_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    status, _, body = ask(fail)
    number = body["error"].rpartition(" ")[2]
    assert status == 500 and body["error"] == f"an error of the server's; its log has it as {number}"
    assert caplog.messages[0] == f"error {number} in POST /search"
    assert caplog.records[0].exc_info is not None


def test_a_refusal_is_one_line_with_its_headers() -> None:
    status, headers, body = ask(refuse, method="GET")
    assert (status, headers["retry-after"], body) == (503, "1", {"error": "one line"})


def test_a_line_for_each_request_without_what_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eclip.serve")
    ask(path="/thumbnails/a\nGET /forged 200", query_string=b"words=secret")
    ask(leaves=True)
    first, second = caplog.messages
    assert first.startswith("POST /thumbnails/a%0AGET%20/forged%20200 200 ") and first.endswith(" ms")
    assert "secret" not in caplog.text
    assert second.startswith("POST /search gone ")
