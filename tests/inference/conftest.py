"""A run of two steps, and the model of it."""

from pathlib import Path

import pytest

import eclip
from eclip.inference import TrainedModel
from tests.training.run_folders import make_data, make_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return make_run(make_data(tmp_path_factory.mktemp("shards")), tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def model(finished: Path) -> TrainedModel:
    return eclip.load(finished)
