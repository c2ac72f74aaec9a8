"""Outputs of locked towers, computed once into a memory map and trained from. From a batch down to the disk:

    cache.py     FeatureCache: opens both arrays, and looks up the features of a batch's images and titles
    outputs.py   what an array holds of a tower, and how it is computed
    file.py      Filling: an array that several processes fill together, and that a kill does not undo
    disk.py      room, locks and notes on the disk

The arrays lie beside the shards: runs on one catalogue share them.
"""
