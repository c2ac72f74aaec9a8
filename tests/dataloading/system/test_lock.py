"""One process at a time: refusing, waiting, and letting go when the holder is killed."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest

from eclip.dataloading.system.lock import alone
from tests.helpers import rank_environment

HOLD = """
import sys, time
from pathlib import Path
from eclip.dataloading.system.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path):
    lock = tmp_path / ".lock"
    with alone(lock):
        with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on "):
            with alone(lock, busy="in use by {holder}"):
                pass
    with alone(lock, busy="free again"):
        pass


def test_waits_for_the_holder(tmp_path):
    order = []
    entered = threading.Event()

    def hold():
        with alone(tmp_path / ".lock"):
            entered.set()
            time.sleep(0.2)
            order.append("first")

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    with alone(tmp_path / ".lock"):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]


def test_a_killed_holder_lets_go(tmp_path):
    lock = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, env=rank_environment())
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="busy"):
            with alone(lock, busy="busy"):
                pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with alone(lock, busy="busy"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_serves_with_a_warning(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    for busy in (None, "in use by {holder}"):
        with alone(tmp_path / ".lock", busy=busy):
            pass
    assert ["no locks on this file system" in record.message for record in caplog.records] == [True, True]
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"), alone(tmp_path / ".lock"):
        pass
