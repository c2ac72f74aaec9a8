"""Compile every kernel ahead of time, without a GPU: fail on what makes it slow or not launch, show what it costs.

    python -m eclip.kernels.compile_check [--arch 80 90 100] [--only slot_attention] [--timeout 60]
    python -m eclip.kernels.compile_check --sweep 40 --seed 0      random calls beside the listed ones
    python -m eclip.kernels.compile_check --call "slot_attention queries=33 dim=1000 dtype=float16"
    python -m eclip.kernels.compile_check --readme                 renew the table in kernels/README.md

The way of a call:

    slot_attention_calls.py, contrastive_calls.py   the listed calls of the launchers; sweep.py draws others
    stub.py       makes the calls on tensors without memory, on a device that is not there: Triton specialises the
                  arguments as in a real call, and says what it would compile
    compiler.py   compiles that, each kernel in a process of its own
    sass.py       reads the machine code: the main loop, what is counted in it and outside
    report.py     what a kernel must not show
    table.py      the table of the README

What is compiled is what a GPU would be given: nothing here repeats a kernel's arguments or block sizes.
"""

from .chips import SHARED_MEMORY

__all__ = ["SHARED_MEMORY"]
