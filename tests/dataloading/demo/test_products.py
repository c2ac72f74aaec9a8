"""The archive holds what its README says."""

from eclip.dataloading.demo.products import read_catalog


def test_catalogue_is_complete() -> None:
    products = read_catalog()
    assert len(products) == 172
    assert sum(len(p.skus) for p in products) == 394
    assert sum(len(s.views) for p in products for s in p.skus) == 3052
    assert all(len(p.names) == 21 and not p.skus[0].recoloured for p in products)
