"""A catalogue embedded into an index: `eclip embed --model RUN --data SHARDS --out INDEX`.

A catalogue's way: rows -> parts -> table -> indexes:
    catalogue.py   shards, or a table and a folder, as rows in one fixed order; facts.py: attributes, facets, price
    encode.py      rows to vectors, boxes and thumbnails
    parts.py       what is done so far, in Parquet files: ranks share them, a kill costs one
    finish.py      all parts to the rows of the table; narrowing.py: vectors of fewer numbers
    store.py       the table in its place, whole; indexes.py: how vectors and titles are found in it
    schema.py      its columns and its record
    run.py         `embed_catalogue`, all of it in order; __main__.py: the command
"""

from eclip.search.embed.catalogue import Catalogue, ShardCatalogue, TableCatalogue
from eclip.search.embed.narrowing import Narrowing
from eclip.search.embed.run import Report, Settings, embed_catalogue
from eclip.search.embed.schema import TABLE, record_of

__all__ = [
    "TABLE",
    "Catalogue",
    "Narrowing",
    "Report",
    "Settings",
    "ShardCatalogue",
    "TableCatalogue",
    "embed_catalogue",
    "record_of",
]
