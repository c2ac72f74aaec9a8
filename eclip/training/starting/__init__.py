"""What a run begins with, and whether it can: called by prepare.py, before anything is written or built.

sizes.py       batch, steps and warm-up of a catalogue of so many products
batches.py     --epochs and --fit-... to numbers; every batch size against ranks, micro-batch and objective
start_from.py  --start-from: the weights, tokenizer and model settings of a trained ECLIP
memory.py      what a step, a loader and a feature cache need, by formulas with measured constants
estimate.py    that against what the machine has: refuse, warn, or say nothing
"""
