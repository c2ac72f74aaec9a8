"""Killed at any point and started again: no image twice, none missing, and what was complete stays until then."""

import subprocess
import sys
from pathlib import Path

import pytest

from eclip.inference import TrainedModel
from eclip.search.embed import Report, ShardCatalogue, embed_catalogue
from tests.helpers import rank_environment, run_torchrun
from tests.search.embed.conftest import quiet
from tests.search.embed.test_run import rows

# One process that does the same embedding again and again in children, each of which is killed somewhere else.
KILLED = """
import contextlib, os, signal, sys
from pathlib import Path
from unittest import mock
import pyarrow.parquet  # here, not in every child; LanceDB has threads, which no fork has
import eclip
from eclip.search.embed import Settings, ShardCatalogue, embed_catalogue
from eclip.search.embed.parts import Parts
from eclip.search.embed.store import Place

model, shards, out = eclip.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(times, call):
    def counted(*args, **kwargs):
        nonlocal times
        times -= 1
        return call(*args, **kwargs) if times >= 0 else die()
    return counted

def half(self, schema, batches, *rest):
    return real_write(self, schema, killed_after_one(batches), *rest)

def killed_after_one(batches):
    yield next(batches)
    die()

real_write = Place.write
def embed(splits, **changes):
    return embed_catalogue(model, ShardCatalogue(shards, splits), Settings(out=out, progress=False, **changes))

def child(way, *splits, **changes):
    if (pid := os.fork()) == 0:
        with way:
            embed(splits, **changes)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

there, alone = out + "/images.lance", contextlib.nullcontext()
assert child(mock.patch.object(Parts, "write", after(1, Parts.write)), "train") == signal.SIGKILL
assert child(mock.patch.object(Place, "write", half), "train") == signal.SIGKILL
assert not os.path.exists(there)
assert child(alone, "train") == 0
assert child(mock.patch.object(Path, "rename", after(1, Path.rename)), overwrite=True) == signal.SIGKILL
assert not os.path.exists(there)  # between two renames
"""

RANKS = """
import os, signal, sys
from eclip.search.embed.__main__ import main
from eclip.search.embed.parts import Parts

real, done = Parts.write, []

def write(self, part, *rest):
    if done and os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        open(sys.argv[-1] + ".killed", "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, part, *rest)
    done.append(part)

Parts.write = write
if __name__ == "__main__":
    from eclip.parallel.ending import leave
    leave(main(sys.argv[1:]))
"""


def test_killed_anywhere_and_started_again(
    made: tuple[Path, Report], model: TrainedModel, run_dir: Path, shards: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(run_dir), str(shards), str(tmp_path / "index")]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="holds an index of 80 images"):  # it was put back before anything else
        embed_catalogue(model, ShardCatalogue(shards), quiet(tmp_path / "index"))
    assert {row["id"].split("/")[0] for row in rows(tmp_path / "index")} == {"train"}
    report = embed_catalogue(model, ShardCatalogue(shards), quiet(tmp_path / "index", overwrite=True))
    assert report is not None and report.embedded == 0  # all parts were there
    assert rows(tmp_path / "index") == rows(made[0])
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["images.lance"]


def test_two_ranks_of_which_one_is_killed(
    made: tuple[Path, Report], run_dir: Path, shards: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "ranks.py", tmp_path / "index"
    script.write_text(RANKS)
    flags = ["--model", str(run_dir), "--data", str(shards), "--split", "train", "test", "--out", str(out)]
    said = run_torchrun("--max-restarts=1", str(script), *flags)
    assert Path(f"{out}.killed").exists() and rows(out) == rows(made[0]), said
    assert "131 images of 4 products" in said and "1 images left out" in said
