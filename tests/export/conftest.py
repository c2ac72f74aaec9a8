"""A run of two steps that was evaluated, and its export with everything."""

from pathlib import Path

import pytest

from eclip.evaluate.run import evaluate_run
from eclip.export.run import Wanted, export_run
from tests.training.run_folders import make_data, make_run


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    run = make_run(make_data(tmp_path_factory.mktemp("shards")), tmp_path_factory.mktemp("runs") / "tiny_run")
    evaluate_run(run, progress=False)
    return run


@pytest.fixture(scope="package")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export_run(finished, out, Wanted(onnx=True, licence="apache-2.0", progress=False))
    return out
