"""Output that nobody reads any more."""

import io
import subprocess
import sys

import pytest

from eclip.dataloading.system.console import Unheard, progress_bar, say
from tests.helpers import rank_environment

CODE = """
import sys
from eclip.dataloading.system.console import say
for i in range(3):
    say(f"line {i}")
print("by others", flush=True)
say("here", sys.stderr)
"""


@pytest.mark.parametrize("output", ["/dev/full", "head"])
def test_a_reader_that_leaves_ends_nothing(output: str) -> None:
    head = subprocess.Popen(["head", "-n", "0"], stdin=subprocess.PIPE)
    head.wait(60)
    assert head.stdin is not None
    with open(output, "w") if output == "/dev/full" else head.stdin as stdout:
        done = subprocess.run(
            [sys.executable, "-c", CODE], stdout=stdout, stderr=subprocess.PIPE, env=rank_environment(), timeout=60
        )
    assert (done.returncode, done.stderr) == (0, b"here\n")


def test_a_reader_that_stays_reads_all() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, env=rank_environment(), timeout=60)
    assert done.stdout == b"line 0\nline 1\nline 2\nby others\n"


def test_what_cannot_be_written_is_dropped() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed, None):
        print("words", file=Unheard(stream), flush=True)


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    say("Stühle \udcff")
    assert written.getvalue() == b"St\\xfchle \\udcff\n"


def test_progress_is_on_standard_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with progress_bar(2, unit="product", desc="packing", disable=False) as bar:
        bar.update(2)
    out, err = capsys.readouterr()
    assert not out and "packing: 100%" in err
