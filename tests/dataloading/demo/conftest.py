"""Shards of the embedded catalogue that tests read and nobody changes."""

from pathlib import Path

import pytest

from eclip.dataloading.demo import pack_demo
from tests.dataloading.demo.packed import SMALL


@pytest.fixture(scope="package")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    pack_demo(folder, **SMALL)
    return folder
