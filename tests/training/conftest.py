"""Fixtures of starts, resumes and steps: catalogues, a run, and a copy of that run to do harm to."""

from pathlib import Path

import pytest

import eclip.training.checkpoint.run_folder
from tests.training.run_folders import copy_run, make_data, make_run
from tests.twelve_products import write_twelve_products


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder in use is refused at once."""
    monkeypatch.setattr(eclip.training.checkpoint.run_folder, "_LOCK_PATIENCE", 0.0)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three splits of nine products."""
    return make_data(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def twelve_products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train split alone, packed in no time."""
    return write_twelve_products(tmp_path_factory.mktemp("twelve"))


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps on `data_dir`. Not to be written to."""
    return make_run(data_dir, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`, with files of a user beside and below its own."""
    return copy_run(finished, tmp_path / "run")
