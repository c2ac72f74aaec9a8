"""How the work of a step is spread over devices and done: nothing here changes what is learnt, rounding aside."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from eclip.setting_rules import Rule, check_settings, require


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Sharding, compilation, what is saved for the backward pass, and in which precision."""

    shard: Literal["none", "full", "hybrid"] = "full"
    """Over ranks: parameters, gradients and optimizer state sharded (full: FSDP2), sharded inside each machine with a
    copy a machine (hybrid), or whole on every rank (none: DDP). All give the same steps and read the others'
    checkpoints."""
    # By arithmetic, for ViT-B/16 with a momentum model on 8 GPUs, `full` saves 4.4 of 5.1 GB a GPU and moves 2.2 GB a
    # step instead of 1.8, most of it beside other work. `none` is for small models on CPUs: with the demo's, two ranks
    # take 0.78 times the processor time of a step of 16 products each.
    reshard: bool = True
    """With sharding: free a block's gathered parameters after its forward pass, gather them again for its backward
    pass: less memory, one more gather."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory, where the optimizer then works too."""
    compile: bool = False
    """Compile every transformer block with torch.compile; the first step then takes a minute or more."""
    activation_checkpointing: Literal["none", "blocks", "selective"] = "none"
    """`blocks` computes each block again in the backward pass, `selective` all of it but its matrix products."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Of the residual stream under bfloat16 autocast. bf16 saves casts and 11% of the saved activations, and rounds the
    sum of every block."""
    # Of vit_b16, saved without checkpointing: 67.0 -> 59.7 MB an image (saved_tensors_hooks; norms and matrix products
    # keep theirs either way). Against float64, outputs of the two towers are 2.2 and 6.3 times as far off as those of
    # the float32 stream, of the slots 1.8 times. No difference of loss curves was seen beyond noise, on a small model
    # on a CPU (benchmarks/results/residual_curve.md).
    text_attention: Literal["auto", "varlen", "xformers", "padded"] = "auto"
    """Attention of ragged titles: torch's varlen kernel, xformers' block-diagonal one, or padded; auto takes the first
    that is installed and works on the device."""

    RULES: ClassVar[dict[str, Rule]] = {}

    def __post_init__(self) -> None:
        check_settings(self, self.RULES)
        require(
            self.shard != "none" or not self.cpu_offload,
            "--cpu-offload with --shard none: only sharded parameters can lie in host memory; use --shard full",
        )
        require(
            self.shard != "none" or self.reshard,
            "--no-reshard with --shard none: every rank keeps whole parameters already; leave one of them out",
        )
