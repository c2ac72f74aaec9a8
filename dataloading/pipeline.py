"""From shards to batches: what both decoders share, and how Pillow decodes.

`BatchSource` makes a batch, which is a part of a step, given a way to decode; it replaces undecodable images and packs
titles and ids. Pillow decodes a JPEG at the smallest DCT scale (1, 1/2, 1/4, 1/8) that is still larger than the crop's
output: 2.2 times the speed of a full decode for 224 px from a megapixel; torch_pipeline.py has it done in worker
processes, DALI's way is in dali_pipeline.py. Both cut the same boxes, computed in sampling.py, out of the pixels that
images/decode.py says an image has: those that packing would store.
"""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .images import CorruptImageError, open_image, resize_box
from .sampling import Rows, Sampler, random_crop
from .schema import Batch, count_titles
from .shards import ShardIndex
from .text import Tokenizer

T = TypeVar("T")
Bad = dict[str, str]
"""Undecodable images: key to reason."""

PREFETCH = 2  # batches ready ahead, for each worker
_LONG_READ = 2.0  # seconds


def decode_crop(data: bytes, size: int, box: tuple[float, float, float, float], *, flip: bool) -> NDArray[np.uint8]:
    """(3, size, size): a box (x0, y0, x1, y1 in pixels of the upright image), resized and perhaps mirrored.

    Raises CorruptImageError (a ValueError).
    """
    pixels = resize_box(open_image(data), box, size)
    return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


def decode_square(data: bytes, size: int) -> Tensor:
    """The evaluation's view: the whole image squashed to a square, (3, size, size) uint8 RGB.

    Boxes of the image scale by size/width and size/height. Raises CorruptImageError (a ValueError).
    """
    opened = open_image(data)
    return torch.from_numpy(resize_box(opened, (0, 0, *opened.size), size).transpose(2, 0, 1).copy())


def image_bytes(size: int) -> int:
    """Of the two images of a product in a batch."""
    return 2 * 3 * size * size


def image_memory(rows: int, size: int) -> Tensor:
    """(rows, 2, 3, size, size) uint8 for the images of a batch: pinned where there is a GPU that copies from it."""
    return torch.empty(rows, 2, 3, size, size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class Stopped(Exception):
    """Nobody wants the batch any more."""


class Reads:
    """Reads images for a thread, which another one may stop, and see waiting for a store that does not answer."""

    def __init__(self, index: ShardIndex):
        self._index, self._stopped = index, False
        self._begun: float | None = None

    def __call__(self, row: int) -> bytes:
        """The bytes of an image. Raises Stopped, and what the index raises."""
        if self._stopped:
            raise Stopped
        self._begun = time.monotonic()
        try:
            return self._index.read_image(row)
        finally:
            self._begun = None

    def stop(self) -> None:
        """Let no further read begin."""
        self._stopped = True

    def hang(self) -> bool:
        """Whether one read has taken long enough to expect no end of it."""
        begun = self._begun
        return begun is not None and time.monotonic() - begun > _LONG_READ


class BatchSource:
    """Makes the batches of one rank; the same (seed, step, part) gives the same batch in any process."""

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        crop_scale: tuple[float, float],
        flip: bool,
        max_tokens: int,
    ):
        self.sampler, self.index, self.tokenizer = sampler, sampler.index, tokenizer
        self.image_size, self.crop_scale, self.flip, self.max_tokens = image_size, crop_scale, flip, max_tokens

    def box(self, draws: NDArray[np.float64], width: int, height: int) -> tuple[tuple[int, int, int, int], bool]:
        """Crop box and mirroring of one view."""
        return random_crop(draws, width, height, self.crop_scale), bool(self.flip and draws[4] < 0.5)

    def _candidates(self, row: int, other: int) -> Iterator[int]:
        yield row
        yield from self.sampler.substitutes(row, other)

    def resolve(self, rows: Rows, attempt: Callable[[int, int, int], T]) -> tuple[Rows, list[T], Bad]:
        """Call attempt(row, i, view) for the drawn rows (B, 2), and for substitutes where it raises CorruptImageError.

        Returns the rows that worked, their 2B results (image by image, view a before view b), and the bad ones.
        Raises ValueError when a product and the next one hold no decodable image.
        """
        final = rows.copy()
        results: list[T] = []
        bad: Bad = {}
        for i, view in np.ndindex(rows.shape):
            drawn, other = int(final[i, view]), int(final[i, 1 - view])
            for row in self._candidates(drawn, other):
                try:
                    results.append(attempt(row, i, view))
                except CorruptImageError as error:
                    bad[self.index.image_key(row)] = str(error)
                else:
                    final[i, view] = row
                    break
            else:
                raise ValueError(
                    f"{self.index.image_key(drawn)}: no image of this product nor of the next one can be decoded; "
                    f"pack the catalogue again (packing rejects undecodable images)"
                )
        return final, results, bad

    def assemble(self, step: int, part: int, rows: Rows, images: Tensor | None) -> Batch:
        """The batch of a part from its final rows (B, 2)."""
        index = self.index
        by_view = [int(row) for row in rows.T.ravel()]
        tokens, cu_seqlens = self.tokenizer.encode([index.title(row) for row in by_view], self.max_tokens)
        token_counts, longest = count_titles(cu_seqlens)
        products = np.array([index.product_of(row) for row in rows[:, 0]], np.int64)
        return Batch(
            images=images,
            image_rows=torch.from_numpy(rows),
            tokens=tokens,
            cu_seqlens=cu_seqlens,
            product_ids=torch.from_numpy(index.product_ids[products]),
            catalog_ids=torch.from_numpy(index.catalog_ids[products]),
            category_ids=torch.from_numpy(index.category_ids[products]),
            title_ids=torch.from_numpy(index.title_ids[rows]),
            keys=[index.image_key(row) for row in by_view],
            step=step,
            epoch=self.sampler.epoch(step),
            part=part,
            parts=self.sampler.parts.count(step),
            token_counts=token_counts,
            longest=longest,
        )

    def without_images(self, step: int, part: int) -> Batch:
        """The batch of a part, nothing decoded."""
        return self.assemble(step, part, self.sampler.draw(step, part)[0], None)

    def decoded(self, step: int, part: int, into: Tensor, read: Callable[[int], bytes]) -> tuple[Batch, Bad]:
        """The batch of a part, decoded with Pillow; and the images that could not be.

        into: (B, 2, 3, S, S) uint8 on the CPU, the batch's `images` afterwards. read: the bytes of an image by its row.
        """
        drawn, draws = self.sampler.draw(step, part)
        images, size = into.numpy(), self.image_size

        def attempt(row: int, i: int, view: int) -> None:
            data = read(row)
            box, flip = self.box(draws[i, view], *open_image(data).size)
            images[i, view] = decode_crop(data, size, box, flip=flip)

        rows, _, bad = self.resolve(drawn, attempt)
        return self.assemble(step, part, rows, into), bad
