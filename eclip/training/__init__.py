"""A training run: what must be there before it starts, its loop, its checkpoints and its folder."""
