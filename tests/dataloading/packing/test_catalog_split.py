"""Splits by catalog id: stable, and a split that would be empty is refused with shares that are not."""

import re

import pytest

from eclip.dataloading.packing.catalog_split import check_shares, require_entries, split_of


@pytest.mark.parametrize(
    "val, test",
    [(-0.1, 0), (0, -1e-9), (0.5, 0.5), (1, 0), (0, 2), (float("nan"), 0), (0, float("nan")), (float("inf"), 0)],
)
def test_shares_out_of_range(val: float, test: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"val={val}, test={test}: expected shares")):
        check_shares(val, test)


def test_an_entry_stays_where_it_is() -> None:
    places = {name: split_of(name, 0.2, 0.2) for name in map(str, range(200))}
    assert set(places.values()) == {"train", "val", "test"}
    # Pinned: another hash would move products of packed catalogues.
    assert [split_of(name, 0.2, 0.2) for name in "236"] == ["train", "test", "val"]
    grown = {name: split_of(name, 0.3, 0.2) for name in places}
    assert all(grown[n] == place for n, place in places.items() if place in ("val", "test"))


@pytest.mark.parametrize("entries", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("val, test", [(0.05, 0.05), (0.01, 0), (0, 0.01), (0.5, 0.49), (0.9, 0)])
def test_the_way_out_gives_each_split_an_entry(entries: int, val: float, test: float) -> None:
    names = [f"entry {i}" for i in range(entries)]
    wanted = {"train", *(["val"] if val else []), *(["test"] if test else [])}
    if {split_of(name, val, test) for name in names} == wanted:
        require_entries(names, val, test)
        return
    with pytest.raises(ValueError, match=rf"each of {entries} catalog entries") as error:
        require_entries(names * 2, val, test)  # entries of several products count once
    way_out = str(error.value).split("; ")[-1]
    shares = {flag: float(share) for flag, share in re.findall(r"--(val|test) ([\d.]+)", way_out)}
    if "would give train" in way_out:
        assert shares.keys() == wanted - {"train"}
        require_entries(names, shares.get("val", 0), shares.get("test", 0))
    else:
        assert entries == 2 and val and test and "leave one out, or add products" in way_out


def test_one_entry_cannot_be_split() -> None:
    require_entries(["a"], 0, 0)
    with pytest.raises(ValueError, match="add products"):
        require_entries(["a", "a"], 0.2, 0)
