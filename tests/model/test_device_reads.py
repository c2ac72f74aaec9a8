"""No step may wait for the GPU in order to learn a number: a fake tensor has no values, so reading one fails."""

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode

from eclip.model.eclip import ECLIP
from tests.model.tiny import tiny

LENGTHS = (3, 1, 7, 4)


def inputs(device: str) -> tuple[Tensor, ...]:
    """Token ids, bounds of the texts, images, kept patches, modalities."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    made = torch.randint(50, (sum(LENGTHS),)), bounds, torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    return tuple(x.to(device) for x in (*made, torch.tensor([0, 3, 4, 9]), torch.randint(2, (4, 5))))


def everything(model: ECLIP, inputs: tuple[Tensor, ...], *, longest: int | None) -> Tensor:
    """A loss of all that training calls: both towers, kept patches, prompts, decoder, heads, temperature."""
    tokens, bounds, images, kept, modality = inputs
    texts = model.encode_text(tokens, bounds, longest=longest)
    image = model.encode_image(images, kept)
    output = model.decode(image.tokens, texts[:, None].expand(-1, 5, -1), modality, return_map=True)
    return output.slots.sum() + output.entropy + model.match(image.cls).sum() * model.scale()


def faked(mode: FakeTensorMode, model: ECLIP) -> tuple[ECLIP, tuple[Tensor, ...]]:
    """Model and inputs without values."""
    with FakeCopyMode(mode):
        return copy.deepcopy(model), tuple(map(mode.from_tensor, inputs("cpu")))


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("slot_heads", [1, 8])
def test_nothing_is_read_from_the_device(pooling: str, slot_heads: int) -> None:
    mode = FakeTensorMode()
    kind = {"last": "clip", "cls": "bert", "mean": "bert"}[pooling]
    seen = "siglip" if pooling == "last" else "vit"
    model, given = faked(
        mode,
        ECLIP(tiny(text_pooling=pooling, slot_heads=slot_heads, text_architecture=kind, vision_architecture=seen)),
    )
    with mode:
        everything(model, given, longest=7).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_the_longest_length_it_is_read() -> None:
    """The test above sees what it is there for."""
    mode = FakeTensorMode()
    model, given = faked(mode, ECLIP(tiny()))
    with mode, pytest.raises(DataDependentOutputException):
        everything(model, given, longest=None)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    model, given = ECLIP(tiny()).cuda(), inputs("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        everything(model, given, longest=7).backward()  # compiles kernels, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything(model, given, longest=7).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
