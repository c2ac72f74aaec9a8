"""The flags by which a user tells how a table is to be read."""

import argparse
from typing import Any

from .columns import parse_columns


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `open_table`; `table_options` reads them."""
    add = parser.add_argument
    add(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the table's column NAME is FIELD (product, title, category, image, sku, source, catalog, "
        "title_<language>, attribute_<name>); several times; FIELD= leaves an optional one out",
    )
    add("--encoding", help="of the table, such as cp1252 (default: by its byte order mark, else UTF-8)")
    add("--separator", help="comma, semicolon, tab, pipe or another character (default: found out)")
    add("--no-quotes", action="store_true", help="the table's cells are never quoted: '\"' is a letter")


def table_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `open_table` that the flags give. Raises ValueError."""
    return {
        "columns": parse_columns(args.column),
        "encoding": args.encoding,
        "separator": args.separator,
        "quotes": not args.no_quotes,
    }
