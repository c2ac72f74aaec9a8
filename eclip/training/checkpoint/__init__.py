"""What a run keeps, and how another process finds it again:

    run_folder.py     a run's folder: what in it is its own, who writes there now
    resume_rules.py   what may change when a run is resumed
    files.py          the files of a checkpoint: whether they are whole, how it is put in place, which ones stay
    saving.py         what is saved, and how it is loaded, by any number of ranks

The trainer sees the names below; files.py, run_folder.py and resume_rules.py are asked directly.
"""

from .saving import load_checkpoint, load_locked_towers, load_run, save_checkpoint

__all__ = ["load_checkpoint", "load_locked_towers", "load_run", "save_checkpoint"]
