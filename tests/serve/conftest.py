"""A run of two steps, the index of 36 images by it, and an application over them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eclip
from eclip.search.embed import Settings, ShardCatalogue, embed_catalogue
from eclip.search.query import Searcher
from eclip.serve.app import create_app
from eclip.serve.limits import Limits
from eclip.serve.service import Service
from tests.training.run_folders import make_data, make_run

LIMITS = Limits(upload_bytes=300_000, pixels=1_000_000, photos=3, texts=4)


@pytest.fixture(scope="package")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    pytest.importorskip("lancedb")
    data, out = make_data(tmp_path_factory.mktemp("shards")), tmp_path_factory.mktemp("index") / "index"
    run = make_run(data, tmp_path_factory.mktemp("runs") / "finished")
    embed_catalogue(eclip.load(run), ShardCatalogue(data, ["test"]), Settings(out=str(out), progress=False))
    return out


@pytest.fixture(scope="package")
def service(index: Path) -> Iterator[Service]:
    made = Service(Searcher.open(index, device="cpu"), LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="package")
def app(service: Service) -> Any:
    pytest.importorskip("fastapi")
    return create_app(service, hosts=("localhost",))


@pytest.fixture
def client(app: Any) -> Any:
    from starlette.testclient import TestClient

    return TestClient(app, base_url="http://localhost")


def photo(width: int = 60, height: int = 40, *, seed: int = 0, kind: str = "JPEG") -> bytes:
    """A file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
