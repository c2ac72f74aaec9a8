"""Batch, steps and warm-up of a catalogue: pure functions of the number of products, for the presets of a shop.

Contrast wants a batch that is large but meets each product rarely: a quarter of the catalogue, as a power of two. 30
passes are a choice that was tried on one catalogue of 342 products only; `make train` passes 317 times over its 121.
With ten thousand steps at most, a large catalogue ends in fewer.
"""

LEAST_PRODUCTS = 300
"""Below this no step is taken: on 25 products R@1 of a trained model fell from 24 to 14 or less."""
LEAST_BATCH = 16
EPOCHS = 30
MOST_STEPS = 10_000
_WARMUP_SHARE = 20


def fitted_batch(products: int, most: int) -> int:
    """The largest power of two up to a quarter of the products, from 16 to `most`; `most` itself need not be one."""
    power = 1 << max(0, (products // 4).bit_length() - 1)
    return min(most, max(LEAST_BATCH, power))


def fitted_steps(products: int, batch: int) -> int:
    """Steps of 30 passes over the products, 10,000 at most; 0 below 300 products."""
    if products < LEAST_PRODUCTS:
        return 0
    return min(MOST_STEPS, max(1, -(-EPOCHS * products // batch)))


def fitted_warmup(steps: int) -> int:
    """A twentieth of the steps."""
    return steps // _WARMUP_SHARE
