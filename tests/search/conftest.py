"""A small shop: a run of two steps, twelve products in shards, and the index of them; the same without a decoder."""

from pathlib import Path

import pytest

import eclip
from eclip.dataloading.packing import write_shards
from eclip.dataloading.schema import ImageRecord, Product
from eclip.inference import TrainedModel
from eclip.search.embed import Settings, ShardCatalogue, embed_catalogue
from eclip.search.query import Searcher
from tests.dataloading.fixtures import jpeg
from tests.training.run_folders import make_data, make_run

QUOTED = "O'Brien \"x\" -- \\"
COLOURS, KINDS = ("red", "blue", "green"), ("sofa", "lamp", "desk", "bed")


def title_of(number: int) -> str:
    return f"{COLOURS[number % 3]} {KINDS[number % 4]} no {number}"


def product(number: int, *, images: int = 4) -> tuple[Product, list[bytes]]:
    """Detail pages and customer photos in turns; every fourth product has no price."""
    records = tuple(ImageRecord(file=f"{i:03d}.jpg", source=("detail", "customer")[i % 2]) for i in range(images))
    price = {} if number % 4 == 0 else {"price": float(10 * number)}
    attributes = {"colour": COLOURS[number % 3], "maker": QUOTED if number == 5 else "us", **price}
    attributes |= {"seats": 5 if number == 5 else 2, "folding": number == 5}
    category = QUOTED if number % 6 == 5 else "things"
    made = Product(
        key=f"k{number:03d}",
        product=f"p{number}",
        title=title_of(number),
        category=category,
        attributes=attributes,
        images=records,
    )
    return made, [jpeg(100 * number + i, 60, 40) for i in range(images)]


def make_index(model: TrainedModel, shards: Path, out: Path, **changes: object) -> Path:
    settings = Settings(out=str(out), progress=False, **changes)  # type: ignore[arg-type]
    assert embed_catalogue(model, ShardCatalogue(shards), settings) is not None
    return out


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; its shards lie in ../data. Not to be written to."""
    folder = tmp_path_factory.mktemp("shop")
    return make_run(make_data(folder / "data"), folder / "run")


@pytest.fixture(scope="session")
def eclip_model(trained: Path) -> TrainedModel:
    return eclip.load(trained)


@pytest.fixture(scope="session")
def shop_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop_shards")
    write_shards([product(number) for number in range(12)], folder, "test")
    return folder


@pytest.fixture(scope="session")
def shop(eclip_model: TrainedModel, shop_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index. Not to be written to."""
    return make_index(eclip_model, shop_shards, tmp_path_factory.mktemp("index") / "shop")


@pytest.fixture(scope="session")
def searcher(shop: Path) -> Searcher:
    return Searcher.open(shop)


@pytest.fixture(scope="session")
def plain(trained: Path, shop_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """Of a model without a decoder."""
    folder = tmp_path_factory.mktemp("plain")
    run = make_run(trained.parent / "data", folder / "run", objective="clip")
    return Searcher.open(make_index(eclip.load(run), shop_shards, folder / "index"))
