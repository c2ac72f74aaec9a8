"""Output that nobody reads any more."""

import subprocess
import sys

import pytest

from tests.helpers import rank_environment

CODE = """
import sys
from eclip.console import say
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
