"""What a model learns from: which losses, their weights, temperatures and random prompts."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from eclip.setting_rules import SHARE, ZERO_OR_MORE, Rule, check_settings, require

_TEMPERATURE = Rule(low=0, above_low=True, why="logits are divided by it")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which losses, with which weights (the paper: a plain sum)."""

    objective: Literal["eclip", "clip"] = "eclip"
    """`clip` trains L_itc alone: the baseline."""
    soft_labels: Literal["none", "title", "catalog"] = "title"
    """L_itc shares the target mass among equal titles, or (e-CLIP) among the products of one catalog id."""
    itc_weight: float = 1.0
    inter_weight: float = 1.0
    itm_weight: float = 1.0
    intra_weight: float = 1.0
    entropy_weight: float = 1.0
    """L_R, the entropy of the assignment of tokens to queries."""
    inter_temperature: float = 0.1
    intra_temperature: float = 0.1
    image_prompt_share: float = 0.5
    """Share of queries prompted by another image of the product instead of a title."""
    own_image_share: float = 0.0
    """Share of positive image prompts that are the image itself, as at inference, instead of another image."""
    gaussian_share: float = 0.0
    """Share of products whose negative prompts are N(0, I), as at inference, instead of other products' prompts."""
    token_keep: float = 1.0
    """Share of the patch tokens that a step's decoder sees, drawn anew each step: less work and less to memorise."""
    ema_momentum: float = 0.996
    decoder_warmup_steps: int = 0
    """Steps over which the weights of the decoder's losses rise from 0."""

    RULES: ClassVar[dict[str, Rule]] = {
        **dict.fromkeys(("image_prompt_share", "own_image_share", "gaussian_share", "ema_momentum"), SHARE),
        **dict.fromkeys(
            ("itc_weight", "inter_weight", "itm_weight", "intra_weight", "entropy_weight", "decoder_warmup_steps"),
            ZERO_OR_MORE,
        ),
        **dict.fromkeys(("inter_temperature", "intra_temperature"), _TEMPERATURE),
        "token_keep": Rule(low=0, high=1, above_low=True, why="the share of patch tokens that stay"),
    }

    def __post_init__(self) -> None:
        check_settings(self, self.RULES)
        used = ("itc",) if self.objective == "clip" else ("itc", "inter", "itm", "intra", "entropy")
        require(
            any(getattr(self, f"{name}_weight") > 0 for name in used),
            f"objective={self.objective} with {', '.join(f'{name}_weight=0' for name in used)}: nothing is left to "
            f"train on; give a weight above 0, e.g. --itc-weight 1",
        )
