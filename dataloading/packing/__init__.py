"""From rows and images to shards: what is accepted, how it is split, and how shards replace older ones together.

A packing's way: rows of a table (or products of the demo) -> samples -> tars -> the data folder:
    drafts.py          rows gathered to products, their images to records
    image_folder.py    the images decoded and encoded anew, in threads
    catalog_split.py   the split of a catalog entry, by a hash of its id
    shard_writer.py    samples into tars
    shard_swap.py      one packing owns a folder; all new shards take the place of the old ones, or none does
"""

from .catalog_split import check_shares, require_entries, split_of
from .drafts import Draft, gather, to_sample
from .image_folder import ImageFolder, decoding_threads
from .shard_swap import (
    RECORD,
    REFUSED,
    REJECTED,
    listed_tars,
    own,
    refuse_foreign,
    replace_shards,
    require_finished,
    write_record,
)
from .shard_writer import Sample, image_name, write_shards, write_tars

__all__ = [
    "RECORD",
    "REFUSED",
    "REJECTED",
    "Draft",
    "ImageFolder",
    "Sample",
    "check_shares",
    "decoding_threads",
    "gather",
    "image_name",
    "listed_tars",
    "own",
    "refuse_foreign",
    "replace_shards",
    "require_entries",
    "require_finished",
    "split_of",
    "to_sample",
    "write_record",
    "write_shards",
    "write_tars",
]
