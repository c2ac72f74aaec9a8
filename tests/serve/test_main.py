"""The server as a user starts and stops it, and the starts that end in one line."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eclip.serve.__main__ import Arguments, main, serve
from tests.helpers import ROOT, rank_environment
from tests.serve.conftest import photo


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """What `main` does to signals ends with a test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def error(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[object, str]:
    """Exit status or message, and what stands on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    told = capsys.readouterr().err
    return stopped.value.code, told


def test_a_start_that_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(tmp_path / "nowhere")
    code, _ = error(capsys, "--index", nowhere, "--port", "0")
    assert str(code).startswith(f"error: {nowhere}: no such folder") and "\n" not in str(code)
    code, told = error(capsys, "--index", nowhere, "--port", "70000")
    assert code == 2 and told == "error: --port 70000: use 0 to 65535\n"
    code, told = error(capsys, "--index", nowhere, "--timeout", "0")
    assert code == 2 and told == "error: --timeout 0.0: use more than 0 and less than a million\n"
    code, told = error(capsys, "--index", nowhere, "--allow-host", "https://shop.example")
    assert code == 2 and "--allow-host 'https://shop.example': a name is wanted" in told
    code, told = error(capsys, "--index", nowhere, "--max-megapixels", "100")
    assert code == 2 and told == "error: --max-megapixels 100: nothing above 80 is decoded; use 80 at most\n"
    code, _ = error(capsys, "--index", nowhere, "--host", "no.such.host.invalid")
    assert str(code).startswith("error: --host no.such.host.invalid: no address of this machine")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _ = error(capsys, "--index", nowhere, "--port", str(port))
        assert code == f"error: --port {port} of 127.0.0.1: Address already in use; take another one, or --port 0"
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r'eclip serve needs the package uvicorn: pip install -e ".\[serve\]"'):
        serve(Arguments(index=nowhere))


def ask(url: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def test_a_server_from_its_start_to_its_end(index: Path) -> None:
    flags = ["--index", str(index), "--port", "0", "--device", "cpu", "--host", "0.0.0.0", "--max-upload-mb", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "eclip.serve", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=rank_environment({"PYTHONUNBUFFERED": ""}),
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"9 products, 36 images of {index}: http://0.0.0.0:"), line + _end(process)[1]
            port = int(re.findall(r":(\d+) ", line)[0])
            url = f"http://127.0.0.1:{port}"
            assert ask(f"{url}/healthz")["status"] == "ok"
            assert len(ask(f"{url}/search", json.dumps({"words": "chair", "limit": 2}).encode())["hits"]) == 2
            body = b'--b\r\nContent-Disposition: form-data; name="photo"; filename="x"\r\n\r\n' + photo() + b"\r\n--b--"
            found = ask(f"{url}/search", body, "multipart/form-data; boundary=b")
            assert (found["photo"]["width"], found["photo"]["height"]) == (60, 40)
            assert _send_endlessly(port) == "HTTP/1.1 413 Request Entity Too Large"
            workers = _children(process.pid)
            assert workers
            process.send_signal(signal.SIGTERM)
            out, told = _end(process)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "stopped\n")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    lines = told.splitlines()
    assert lines[0] == "warning: --host 0.0.0.0: no login; whoever reaches this port may search"
    assert [re.sub(r"^\S+ \S+ | \d+ ms$", "", line) for line in lines[1:]] == [
        "GET /healthz 200", "POST /search 200", "POST /search 200", "POST /search 413",
    ]  # fmt: skip


def _end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    return process.communicate(timeout=30)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _send_endlessly(port: int) -> str:
    """The first line of the answer to an upload of chunks that would never end."""
    chunk = b"%x\r\n%s\r\n" % (1 << 16, b"\0" * (1 << 16))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        kind = b"content-type: application/json\r\ntransfer-encoding: chunked\r\n"
        connection.sendall(b"POST /search HTTP/1.1\r\nhost: localhost\r\n" + kind + b"\r\n" + 20 * chunk)
        return connection.recv(4096).decode().splitlines()[0]
