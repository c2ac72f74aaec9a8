"""The embedded catalogue: 172 real products (CC0) composed into scenes, packed into train, val and test shards.

The way of a product, from the archive in catalog/ to a shard:
    products.py    the archive: views (renderings without background) and facts, SKUs grouped
    colours.py     is the colour seen that the facts name?        titles.py   the facts as titles and labels
    split.py       which products are near-identical, and the side of the split of each
    scenes.py      a product and its distractors in a picture, with boxes, on surfaces of textures.py
    samples.py     all images of a product and its record, from one seeded plan
    pack.py        processes, shards, the record of what they were made by; `python -m eclip.dataloading.demo`
"""

from .pack import pack_demo

__all__ = ["pack_demo"]
