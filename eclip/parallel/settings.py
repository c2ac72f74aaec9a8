"""How the work of a step is spread over devices and done: nothing here changes what is learnt, rounding aside."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from eclip.setting_rules import Rule, check_settings, require


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Sharding, compilation, what is saved for the backward pass, and in which precision."""

    shard: Literal["none", "full", "hybrid"] = "full"
    """Over ranks: `full` shards parameters, gradients and optimizer state (FSDP2), `hybrid` does so inside each machine
    and keeps a copy a machine, `none` keeps everything on every rank and averages gradients (DDP). The steps are the
    same, and each reads the others' checkpoints. By arithmetic, for ViT-B/16 with a momentum model on 8 GPUs, `full`
    saves 4.4 of 5.1 GB a GPU and moves 2.2 GB a step instead of 1.8, most of it beside other work. `none` is for small
    models on CPUs: with the demo's, two ranks take 0.78 times the processor time of a step of 16 products each."""
    reshard: bool = True
    """Free a block's gathered parameters after its forward pass and gather them again for its backward pass."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory."""
    compile: bool = False
    """Compile every transformer block with torch.compile; the first step then takes a minute or more."""
    activation_checkpointing: Literal["none", "blocks", "selective"] = "none"
    """`blocks` computes each block again in the backward pass, `selective` all of it but its matrix products."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Of the residual stream under bfloat16 autocast: bf16 halves the saved activations and most copies."""
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
