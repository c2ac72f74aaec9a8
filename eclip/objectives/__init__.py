"""What a model learns from: one objective a file behind one seam, and what they share.

objective.py      the seam: `Objective`, `make_objective`; read this first
clip.py, eclip.py the two objectives
views.py          a view of the batch encoded, by towers or out of the cache
draws.py          random prompts and patch tokens of a step
contrast.py       L_itc and L_inter, which couple rows, and the way to their kernels
matching.py       L_itm      intra_product.py  L_intra
settings.py       `ObjectiveConfig`: which, with which weights
"""
