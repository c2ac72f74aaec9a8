"""A model of the tests' size, the same for every test."""

import pytest
import torch

from eclip.model.eclip import ECLIP
from tests.model.tiny import TINY


@pytest.fixture
def model() -> ECLIP:
    torch.manual_seed(0)
    return ECLIP(TINY)
