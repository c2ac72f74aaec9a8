"""Tables of shops: CSV and JSON lines of any dialect, their columns understood, to rows of products.

A table's way: bytes -> text -> records -> columns -> values -> rows:
    encoding.py       the text of a file in whatever encoding it has
    records.py        CSV and JSON lines, a record at a time, with its line
    columns.py        which column is which field: by name, alias, or as told
    values.py         cells to clean values; what counts as missing
    image_names.py    cells to the images that they name, as their files are spelt
    scan.py           the first reading: what is broken, and a sample by which columns and image names are understood
    table.py          `open_table`: all of it, then row by row; arguments.py: its flags
"""

from .arguments import add_table_arguments, table_options
from .scan import NoImages
from .table import Row, Table, open_table, require_places

__all__ = [
    "NoImages",
    "Row",
    "Table",
    "add_table_arguments",
    "open_table",
    "require_places",
    "table_options",
]
