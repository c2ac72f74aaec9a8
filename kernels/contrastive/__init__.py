"""Contrastive losses of large batches whose logits are never in memory: softmax (InfoNCE) and sigmoid (SigLIP).

A call, from the public function to the kernels and back (README.md says what each costs):

    loss.py, sigmoid.py   check arguments (arguments.py), name the logits (problem.py), hand them to ops.py or ranks.py
    ops.py                one process: `pair_loss`, op `pair_total`. A CPU and fp64 take plain.py instead of the kernels
    ranks.py              several: the texts are gathered, the sums of ops.py taken, those of columns all-reduced
    triton_forward.py     launches the kernels of row and column sums; triton_positives.py adds the positives in fp32
    triton_backward.py    back, op `pair_gradients`: blocks of the logits' gradient, two GEMMs each; positives last
    ranks.py              again: the texts' gradients travel to their ranks and are added up there

options.py says what the kernels take, in which tiles, and when the forward keeps exp(logits); triton_tiles.py holds the
device functions that kernels share.
"""

from .loss import KEEP_BYTES, contrastive_loss, contrastive_loss_reference
from .options import supported
from .sigmoid import sigmoid_loss, sigmoid_loss_reference

__all__ = [
    "KEEP_BYTES",
    "contrastive_loss",
    "contrastive_loss_reference",
    "sigmoid_loss",
    "sigmoid_loss_reference",
    "supported",
]
