"""Which split a catalog entry is in: a fixed function of its id, so that it stays there when others come.

Shares of a small catalogue may leave a split without any entry. Moving one there would break the rule, and with the
next delivery the entry would move back from val to train; so that is refused, with shares that do give each split one.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from .shard_swap import SPLITS


def check_shares(val: float, test: float) -> None:
    """Raise ValueError unless both are at least 0 and leave something for train."""
    if not (val >= 0 and test >= 0 and val + test < 1):  # also for NaN
        raise ValueError(f"val={val}, test={test}: expected shares of at least 0 with a sum below 1")


def _position(catalog: str) -> float:
    digest = hashlib.blake2b(catalog.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _split(position: float, val: float, test: float) -> str:
    return "test" if position < test else "val" if position < test + val else "train"


def split_of(catalog: str, val: float, test: float) -> str:
    """The split of a catalog entry for these shares."""
    return _split(_position(catalog), val, test)


def require_entries(catalogs: Iterable[str], val: float, test: float) -> None:
    """Raise ValueError when one of the splits asked for would be without an entry."""
    entries = set(catalogs)
    wanted = [split for split, share in zip(SPLITS, (1.0, val, test), strict=True) if share > 0]
    found = Counter(split_of(entry, val, test) for entry in entries)
    empty = [split for split in wanted if not found[split]]
    if empty:
        raise ValueError(
            f"with {_flags(val, test)} split {' and '.join(empty)} would be without a product (a hash of its id places "
            f"each of {len(entries)} catalog entries); {_way_out(entries, val, test)}"
        )


def _flags(val: float, test: float) -> str:
    return " ".join(f"--{name} {share:g}" for name, share in (("val", val), ("test", test)) if share)


def _way_out(entries: set[str], val: float, test: float) -> str:
    """The shares nearest to those asked for that give each split an entry, in steps of 1%."""
    positions = np.sort([_position(entry) for entry in entries])
    steps = np.arange(1, 100) / 100
    best: tuple[float, float, float] | None = None
    for v in steps if val else [0.0]:
        for t in steps if test else [0.0]:
            low, high = np.searchsorted(positions, [t, t + v])
            whole = high < len(positions) and (low > 0 or not test) and (high > low or not val)
            if whole and (best is None or abs(v - val) + abs(t - test) < best[0]):
                best = (abs(v - val) + abs(t - test), v, t)
    if best is None:
        return "no shares would do: leave one out, or add products"
    counts = Counter(_split(position, best[1], best[2]) for position in positions)
    given = ", ".join(f"{split} {counts[split]}" for split in SPLITS if counts[split])
    return f"{_flags(best[1], best[2])} would give {given}"
