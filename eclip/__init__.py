"""ECLIP: instance-level vision-language pretraining for e-commerce (arXiv 2304.02853 and 2207.00208)."""

__version__ = "0.1.0"
