"""Tars of samples: scanned once, read at random.

The way of a tar: headers -> members -> samples (index, see ../shards.py) -> bytes by their place:
    members.py      one scan: where every member lies, which of them are one sample, whether the tar is whole
    open_tars.py    `pread` from any thread or process, with as many tars open as the system allows
"""

from .members import IMAGE_SUFFIXES, Span, is_image, is_json, read_samples
from .open_tars import OpenTars

__all__ = ["IMAGE_SUFFIXES", "OpenTars", "Span", "is_image", "is_json", "read_samples"]
