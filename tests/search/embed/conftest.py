"""A run of two steps, shards of 132 images of which one is damaged, and the index of them."""

from pathlib import Path

import pytest

import eclip
from eclip.inference import TrainedModel
from eclip.search.embed import Report, Settings, ShardCatalogue, embed_catalogue
from tests.dataloading.fixtures import jpeg, make_split
from tests.training.run_folders import make_data, make_run

DAMAGED = "test/k001/003.jpg"


@pytest.fixture(scope="package")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return make_run(make_data(tmp_path_factory.mktemp("training")), tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="package")
def model(run_dir: Path) -> TrainedModel:
    return eclip.load(run_dir)


@pytest.fixture(scope="package")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits: three parts, the second of which has images of both."""
    folder = tmp_path_factory.mktemp("catalogue")
    make_split(folder, "train", products=4, images=20, tars=2)
    damaged = b"\xff\xd8\xff no picture"
    make_split(
        folder,
        "test",
        products=4,
        images=13,
        image=lambda p, i: damaged if (p, i) == (1, 3) else jpeg(7 * p + i, 300 if i == 0 else 48, 200),
    )
    return folder


@pytest.fixture(scope="package")
def made(model: TrainedModel, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """An index and the report of making it. Not to be written to."""
    out = tmp_path_factory.mktemp("index") / "an index ü"
    report = embed_catalogue(model, ShardCatalogue(shards), quiet(out))
    assert report is not None
    return out, report


def quiet(out: Path | str, **changes: object) -> Settings:
    return Settings(out=str(out), progress=False, **changes)  # type: ignore[arg-type]
