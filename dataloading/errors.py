"""What is wrong with the data: an error that stops the work, or a note of what packing left out and why."""

from dataclasses import dataclass
from typing import Literal


class DataError(ValueError):
    """Not one image is at fault: a tar changed or cannot be read, a worker was killed, a loader stalls. One line."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A row of the table, an image or a product that was left out.

    `reason` is one of few sentences, so that equal faults count together; what differs from case to case (byte counts,
    values, the decoder's own words) is `detail`.
    """

    kind: Literal["row", "image", "product"]
    where: str
    """The table and the row's number, the image's path as the table has it, or the product's id."""
    reason: str
    detail: str = ""
