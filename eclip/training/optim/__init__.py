"""What of a model learns, how fast and by which rule:

    locks.py      which parameters learn: towers that are locked, whole or but for their last blocks
    groups.py     how fast and with which decay: towers slower, lower layers slower still
    schedule.py   the learning rate of every step
    optimizer.py  the rule: fused AdamW, or by flag one of the two below; skipped steps; what a checkpoint holds
    apex_adam.py  NVIDIA apex's FusedAdam, on a rank's own shards
    muon.py       Muon for the matrices of the blocks, whole ones, and AdamW for the rest

The trainer sees the names below alone.
"""

from .groups import param_groups
from .locks import check_locks, lock_towers
from .optimizer import build_optimizer, check_optimizer, describe_switch, fresh_state, step_if_finite
from .schedule import learning_rate, set_learning_rate

__all__ = [
    "build_optimizer",
    "check_locks",
    "check_optimizer",
    "describe_switch",
    "fresh_state",
    "learning_rate",
    "lock_towers",
    "param_groups",
    "set_learning_rate",
    "step_if_finite",
]
