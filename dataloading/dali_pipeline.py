"""The DALI decode path: crop-in-decode, resize and mirror, on the CPU (`cpu` backend) or on a GPU (`mixed`).

DALI gets the bytes, boxes and mirror flags of a batch from a callable of the batch index, so that order, pairs and
crops stay ours (sampling.py) and a resumed run starts its pipeline at any batch. It gets what it shows as Pillow does,
all of a packed catalogue; of an image of another kind (images/headers.py) it gets the crop that Pillow has made.

Damaged files need care (DALI 2.4.0): bytes that do not parse can crash the process, so headers are parsed before they
are handed over; a file that parses but does not decode raises RuntimeError and leaves the pipeline dead, so the bad
image is then looked for with Pillow, quarantined, and a new pipeline starts at the same batch.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .images import CorruptImageError, check_pixels, open_image, plain, plain_bytes
from .pipeline import PREFETCH, Bad, BatchSource, Reads, decode_crop, decode_square
from .sampling import Rows
from .schema import Batch

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

log = logging.getLogger(__name__)


def _size_parser() -> Callable[[bytes], tuple[int, int]]:
    """bytes -> (width, height), raising RuntimeError or ValueError; by DALI's own parser where it can be had."""
    if importlib.util.find_spec("nvidia.nvimgcodec") is None:
        return lambda data: open_image(data).size
    from nvidia import nvimgcodec

    def parse(data: bytes) -> tuple[int, int]:
        stream = nvimgcodec.CodeStream(data)
        return stream.width, stream.height  # parses now

    return parse


def _as_pnm(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(3, H, W) RGB as the bytes of a file that any decoder reads without loss."""
    header = np.frombuffer(b"P6 %d %d 255\n" % pixels.shape[:0:-1], np.uint8)
    return np.concatenate([header, pixels.transpose(1, 2, 0).ravel()])


def _build(
    source: Callable[[int], Any], size: int, *, batch_size: int, num_threads: int, device_id: int | None
) -> "Pipeline":
    """Encoded images, corners, shapes, mirror flags -> (batch_size, 3, size, size) uint8; on the CPU without a device.

    source: called with 0, 1, 2, ...; corners and shapes are (batch_size, 2) int32 pixels, width before height. It may
    give fewer images than batch_size.
    """
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(batch_size, num_threads, device_id, prefetch_queue_depth=PREFETCH)
    with pipe:
        encoded, corners, shapes, mirror = fn.external_source(
            source=source, num_outputs=4, batch=True, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32]
        )
        images = fn.decoders.image_slice(
            encoded,
            corners,
            shapes,
            device="cpu" if device_id is None else "mixed",
            axis_names="WH",
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.RGB,
            adjust_orientation=False,  # images that are not upright are decoded by Pillow
        )
        # Antialiased cubic: within 1 of 255 of Pillow's BICUBIC where no DCT-scaled decode comes in.
        images = fn.resize(images, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)
        pipe.set_outputs(
            fn.crop_mirror_normalize(
                images, mirror=mirror, dtype=types.UINT8, output_layout="CHW", mean=[0.0] * 3, std=[1.0] * 3
            )
        )
    pipe.build()
    return pipe


class DaliPipeline:
    """Batches from number `first` on, decoded by DALI; images lie on the current CUDA device if there is one."""

    def __init__(self, source: BatchSource, *, first: int, num_threads: int):
        self.source, self.parts = source, source.sampler.parts
        self.number, self.num_threads = first, num_threads
        self._reads = Reads(source.index)
        self._parse = _size_parser()
        self._quarantine: dict[int, str] = {}  # row to reason
        self._plans: dict[int, tuple[Rows, Bad]] = {}  # by batch number
        self._copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._start()

    def _start(self) -> None:
        """Build a pipeline whose first batch is number `self.number`."""
        self._plans.clear()
        self._failure: Exception | None = None
        first, gpu = self.number, torch.cuda.is_available()
        self._pipe: Pipeline | None = _build(
            lambda batch_index: self._feed_or_end(first + batch_index),
            self.source.image_size,
            batch_size=self.parts.most_rows * 2,
            num_threads=self.num_threads,
            device_id=torch.cuda.current_device() if gpu else None,
        )

    def _size(self, data: bytes) -> tuple[int, int] | None:
        """Width and height if DALI shows this image as Pillow does, else None. Raises CorruptImageError."""
        if not plain_bytes(data) and not plain(open_image(data)):
            return None
        try:
            size = self._parse(data)
        except RuntimeError:
            open_image(data)  # says what is wrong, unless it is with DALI's parser alone
            return None
        check_pixels(*size)
        return size

    def _attempt(self, row: int, draws: NDArray[np.float64]) -> tuple[NDArray[np.uint8], tuple[int, ...], bool]:
        """An image's bytes, crop box and mirroring. Raises CorruptImageError."""
        if row in self._quarantine:
            raise CorruptImageError(self._quarantine[row])
        data, side = self._reads(row), self.source.image_size
        try:
            size = self._size(data)
            box, flip = self.source.box(draws, *(size or open_image(data).size))
            if size is None:  # Pillow decodes and crops; only the mirroring is left to DALI
                return _as_pnm(decode_crop(data, side, box, flip=False)), (0, 0, side, side), flip
        except CorruptImageError as error:
            self._quarantine[row] = str(error)
            raise
        return np.frombuffer(data, np.uint8), box, flip

    def _feed(self, number: int) -> tuple[Any, ...]:
        """What DALI asks for: 2B encoded images, corners, shapes (both width before height) and mirror flags."""
        drawn, draws = self.source.sampler.draw(*self.parts.place(number))
        rows, ready, bad = self.source.resolve(drawn, lambda row, i, view: self._attempt(row, draws[i, view]))
        self._plans[number] = rows, bad
        boxes = np.array([box for _, box, _ in ready], np.int32)
        flips = np.array([flip for _, _, flip in ready], np.int32)
        corners = np.ascontiguousarray(boxes[:, :2])
        return [data for data, _, _ in ready], corners, boxes[:, 2:] - corners, flips

    def _feed_or_end(self, number: int) -> tuple[Any, ...]:
        """DALI asks for batches ahead: an error waits until those before it were given, for DALI sees the end."""
        try:
            return self._feed(number)
        except Exception as error:
            self._failure = error
            raise StopIteration from None

    def _run(self) -> Tensor:
        assert self._pipe is not None
        try:
            (output,) = self._pipe.run()
        except StopIteration:
            assert self._failure is not None
            raise self._failure from None
        if self._copies is None:
            return torch.from_numpy(np.array(output.as_array()))  # DALI uses its memory again
        # The copy must be done before DALI goes on, and must not wait for the training step queued on the main stream.
        with torch.cuda.stream(self._copies):
            images = torch.from_dlpack(output.as_tensor()).clone()
        self._copies.synchronize()
        images.record_stream(torch.cuda.current_stream())
        return images

    def _dali_refuses(self, row: int) -> str:
        """Why DALI cannot decode an image alone, on the CPU; empty if it can."""
        data = self._reads(row)
        if (size := self._size(data)) is None:
            return ""  # Pillow decodes it
        shape = np.array([size], np.int32)
        feed = [np.frombuffer(data, np.uint8)], np.zeros((1, 2), np.int32), shape, np.zeros(1, np.int32)
        pipe = _build(lambda _: feed, self.source.image_size, batch_size=1, num_threads=1, device_id=None)
        try:
            pipe.run()
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        return ""

    def _quarantine_bad(self) -> bool:
        """Find undecodable images among the batches in flight; True if there are new ones."""
        before = len(self._quarantine)
        planned = sorted({int(row) for rows, _ in self._plans.values() for row in rows.ravel()})
        for row in planned:
            try:
                decode_square(self._reads(row), self.source.image_size)
            except CorruptImageError as error:
                self._quarantine[row] = str(error)
        if len(self._quarantine) == before:  # Pillow decodes all of them: ask DALI, one by one
            failed = {row: reason for row in planned if (reason := self._dali_refuses(row))}
            if len(failed) < len(planned):  # otherwise the fault is not in the images
                self._quarantine |= failed
        return len(self._quarantine) > before

    def __next__(self) -> tuple[Batch, Bad]:
        """The next batch and the undecodable images met in it."""
        images = None
        while images is None:
            try:
                images = self._run()
            except RuntimeError:
                if not self._quarantine_bad():
                    raise
                name = self.parts.name(self.number)
                log.info("%s: DALI starts again with %d images left out", name, len(self._quarantine))
                self._start()
        rows, bad = self._plans.pop(self.number)
        step, part = self.parts.place(self.number)
        batch = self.source.assemble(step, part, rows, images.unflatten(0, (-1, 2)))
        self.number += 1
        return batch, bad

    def stop(self) -> None:
        """End the feeding of a batch in another thread; what DALI has it finishes."""
        self._reads.stop()

    def hangs(self) -> bool:
        """Whether that thread waits for a store that does not answer."""
        return self._reads.hang()

    def close(self) -> None:
        """Drop the pipeline and its threads."""
        self._pipe = None
