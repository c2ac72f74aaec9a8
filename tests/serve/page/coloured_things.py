"""A catalogue of coloured things and a model that sees colours: which product comes first is decided by the data.

The index, the searcher and the server over them are the real ones. Only the towers and the decoder are stood in for: a
text is the colours that it names, a patch of a picture is its colour, an instance is what a prompt's colours select.
"""

import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from eclip.inference import EncodedImages, Encoder, Instances, TrainedModel
from eclip.model.eclip import ImageFeatures
from eclip.search.embed.catalogue import Listing
from eclip.search.embed.run import Settings, embed_catalogue
from eclip.search.query import Searcher
from eclip.search.query.table import ImageTable
from eclip.serve.app import create_app
from eclip.serve.limits import Limits
from eclip.serve.service import Service
from tests.helpers import free_port

COLOURS = {
    "red": (214, 40, 40),
    "blue": (30, 80, 220),
    "green": (40, 160, 70),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
}
WALL = (226, 224, 220)
SIDE, GRID = 64, 8
_FAR = 60.0
"""Distance in RGB from which on a patch is not this colour."""
# Product, title, colour, category, price. One title is made to look like HTML: it is text.
PRODUCTS = (
    ("p1", "Red sofa", "red", "Living room", 420.0),
    ("p2", "Blue lamp", "blue", "Lights", 35.5),
    ("p3", "Green chair", "green", "Living room", 80.0),
    ("p4", "Yellow desk <b id=injected>sale</b> & more", "yellow", "Office", 210.0),
    ("p5", "Purple bed", "purple", "Bedroom", 640.0),
    ("p6", "Orange stool", "orange", "Kitchen", None),
)


class ColourEncoder(Encoder):
    """The towers' and the decoder's part, by colours. D = 7: six colours, and one that everything has a little of."""

    has_decoder, max_tokens = True, 16
    device, embed_dim, image_size = torch.device("cpu"), len(COLOURS) + 1, SIDE  # type: ignore[assignment]
    fingerprint = "colours"  # type: ignore[assignment]

    def __init__(self) -> None:
        """It has no weights."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(m, D) the colours that are named."""
        return torch.tensor([[*(float(name in text.lower()) for name in COLOURS), 0.1] for text in texts])

    def images(self, squares: Tensor, sizes: Sequence[tuple[int, int]]) -> EncodedImages:
        """The colour of each of 8 x 8 patches; the picture is their mean."""
        patches = F.adaptive_avg_pool2d(squares.float(), GRID).flatten(2).transpose(1, 2)  # (n, N, 3)
        palette = torch.tensor([[*COLOURS.values()]], dtype=torch.float32)
        near = (1 - torch.cdist(patches, palette.expand(len(patches), -1, -1)) / _FAR).clamp_min(0)
        tokens = torch.cat([near, torch.full_like(near[..., :1], 0.01)], dim=-1)
        return EncodedImages(ImageFeatures(tokens.mean(1), tokens), list(sizes))

    def instances(self, images: EncodedImages, prompts: Tensor, modality: int) -> Instances:
        """The patches of the prompt's colours, and their mean."""
        tokens = images.features.tokens
        shares = torch.einsum("bnd,bd->bn", tokens, F.normalize(prompts, dim=-1)).clamp(0, 1)
        return Instances(F.normalize(torch.einsum("bn,bnd->bd", shares + 1e-4, tokens), dim=-1), shares)


class ColourCatalogue:
    """Two pictures of each product: alone, and on the left of something grey."""

    name, fingerprint = "coloured things", "coloured things 1"

    def __init__(self) -> None:
        self.rejected: list[object] = []

    def __len__(self) -> int:
        return 2 * len(PRODUCTS)

    def listings(self, first: int, last: int) -> Iterator[Listing]:
        """Rows first .. last - 1."""
        for row in range(first, last):
            key, title, colour, category, price = PRODUCTS[row // 2]
            size, box = ((320, 240), (40, 50, 150, 190)) if row % 2 else ((240, 240), (60, 60, 180, 180))
            yield Listing(
                id=f"{key}/{row % 2:03d} ü.jpg",
                product=key,
                title=title,
                category=category,
                attributes={"colour": colour, "material": ("wood", "steel")[row // 2 % 2], "price": price},
                image=f"{key}.jpg",
                source="detail",
                read=lambda size=size, colour=colour, box=box: picture(size, {colour: box}),  # type: ignore[misc]
            )


def picture(size: tuple[int, int], things: dict[str, tuple[int, int, int, int]]) -> bytes:
    """A JPEG of rectangles (x0, y0, x1, y1) of colours before a light wall."""
    image = Image.new("RGB", size, WALL)
    draw = ImageDraw.Draw(image)
    for colour, box in things.items():
        draw.rectangle(box, fill=COLOURS[colour])
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return out.getvalue()


def colour_model() -> TrainedModel:
    """A model that sees colours."""
    return TrainedModel(ColourEncoder(), source="colours")


def make_index(folder: Path) -> Path:
    """The index of the coloured things; returns its folder."""
    embed_catalogue(colour_model(), ColourCatalogue(), Settings(out=str(folder), progress=False, workers=1))
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The real application over an index of the coloured things, in a thread: its address."""
    import uvicorn

    searcher = Searcher(ImageTable.open(make_index(folder / "index")), colour_model())
    service, port = Service(searcher, Limits()), free_port()
    app = create_app(service, hosts={"127.0.0.1"})
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        give_up = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < give_up, "the server did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        service.close()
