"""The evaluation at the end of a run on two ranks: both encode, numbers are one process's, and it can be stopped."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from eclip.evaluate.run import evaluate_run
from tests.helpers import run_torchrun
from tests.processes import Processes, alive
from tests.twelve_products import write_twelve_products

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
# The user's command, with batches of two images, so that there are some for each rank.
TRAIN = """
import functools, os, sys, time
import eclip.evaluate.extraction as extraction
import eclip.evaluate.run as run
from eclip.parallel.ending import leave
from eclip.train import main

run.evaluate_run = functools.partial(run.evaluate_run, batch_size=2)
decode, decoded, rank = extraction.decode_square, [], os.environ["RANK"]

def counted(*args):
    decoded.append(1)
    if "SLOW" in os.environ:
        print(f"rank {rank} encodes, process {os.getpid()}", flush=True)
        time.sleep(0.5)
    return decode(*args)

extraction.decode_square = counted
status = main(sys.argv[1:])
print(f"rank {rank} decoded {len(decoded)}", flush=True)
leave(status)
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue whose test split is its train split."""
    folder = write_twelve_products(tmp_path_factory.mktemp("data"))
    shutil.copy(folder / "train-000000.tar", folder / "test-000000.tar")
    return folder


def _flags(data_dir: Path, run_dir: Path) -> list[str]:
    return ["--preset", "debug", "--steps", "1", "--data-dir", str(data_dir), "--run-dir", str(run_dir)]


@pytest.mark.parametrize("more", [(), ("--lock-image", "--cache-features")], ids=["trained", "cached"])
def test_two_ranks_evaluate_as_one(more: tuple[str, ...], data_dir: Path, tmp_path: Path) -> None:
    output = run_torchrun(TRAIN, *_flags(data_dir, tmp_path / "run"), *more)
    decoded = sorted(map(int, re.findall(r"rank \d decoded (\d+)", output)))
    assert decoded == ([0, 0] if more else [24, 24]), output  # the cache is filled by another function
    together = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    alone = evaluate_run(tmp_path / "run", batch_size=2, progress=False)
    assert together["tables"] == json.loads(json.dumps(alone["tables"]))
    assert together["images"] == alone["images"] == 48


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_is_stopped_while_both_encode(signum: signal.Signals, data_dir: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank stops both with a line; one that is killed is named. The run itself is complete."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    with Processes() as processes:
        os.environ["SLOW"] = "1"
        try:
            started = processes.start_ranks([sys.executable, str(script), *_flags(data_dir, tmp_path / "run")])
        finally:
            del os.environ["SLOW"]
        processes.wait_for(r"rank 0 encodes")
        processes.wait_for(r"rank 1 encodes, process \d+\n")
        os.kill(started[1].pid, signum)
        codes = [processes.wait(process) for process in started]
        assert not alive([process.pid for process in started])
        output = processes.output
    if signum == signal.SIGTERM:
        assert codes == [143, 143], output
        assert output.count("SIGTERM: the run is complete, its evaluation is not; repeat that with") == 1, output
    else:
        assert codes == [1, -9], output
        assert len(re.findall(r"error: rank 1 \(process \d+ on .*\) left without a word", output)) == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()
