"""torch.compile, block by block and from outside the model.

Blocks of a kind share their compiled code, so that a tower of 24 takes no longer to compile than one of 2. What lies
between blocks, and FSDP2's gathering of their parameters, stays as it is. A first step compiles for each tower with and
without gradient, and for the first, the inner and the last block of the decoder: a minute or more.
"""

from torch import nn

VARYING = ("text_encoder",)
"""Modules whose blocks see another number of rows in every step."""
VARIANTS = 64
"""Compiled forms of one function, beyond which PyTorch gives up and runs it as it is. Its own limit of 8 is reached by
three towers with and without gradient; a batch-size schedule adds one a size to the image tower and the decoder."""


def compile_blocks(root: nn.Module, *, backend: str = "inductor") -> int:
    """Compile every transformer block at its first call; in place, names stay. Returns how many blocks there are.

    Blocks are the members of every ModuleList named `blocks`, those that do not train too. Call it after
    `checkpoint_activations` and before the blocks are sharded. A copy (`copy.deepcopy`) of a compiled block is not
    compiled.
    """
    from torch._dynamo import config as dynamo  # takes a second

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    count = 0
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
            varies = any(part in VARYING for part in name.split("."))
            for block in module:
                block.compile(backend=backend, dynamic=varies)
                count += 1
    return count
