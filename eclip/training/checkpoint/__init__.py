"""What a run keeps, and how another process finds it again:

    run_folder.py     a run's folder: what in it is its own, who writes there now
    resume_rules.py   what may change when a run is resumed
    files.py          the files of a checkpoint: whether they are whole, how it is put in place, which ones stay
    tensors.py        the tensors of a checkpoint: their names, and whether a model fits
    saving.py         all ranks write one
    writer.py         a run's checkpoints one after the other, in the background if wanted
    loading.py        any number of ranks read one, or a single process that uses the model

The trainer sees the names below; files.py, run_folder.py and resume_rules.py are asked directly.
"""

from .files import Which
from .loading import Weights, load_checkpoint, load_locked_towers, load_run
from .saving import save_checkpoint
from .writer import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "Weights",
    "Which",
    "load_checkpoint",
    "load_locked_towers",
    "load_run",
    "save_checkpoint",
]
