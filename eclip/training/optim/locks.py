"""Locked towers: none of their parameters learns, or those of the last blocks alone."""

from torch import nn

from eclip.config import RunConfig
from eclip.model.eclip import ECLIP


def check_locks(config: RunConfig) -> None:
    """Raise ValueError when --unlock-last leaves no block of a locked tower locked."""
    towers = (
        ("--lock-image", config.lock_image, config.model.vision_depth),
        ("--lock-text", config.lock_text, config.model.text_depth),
    )
    for flag, locked, depth in towers:
        if locked and config.unlock_last >= depth:
            raise ValueError(
                f"--unlock-last {config.unlock_last} with {flag}: no block of that tower would stay locked (depth "
                f"{depth}); drop {flag}, or unlock fewer"
            )


def lock_towers(model: ECLIP, config: RunConfig) -> None:
    """Let the locked towers of a new model require no gradient, but for the last `unlock_last` blocks.

    What follows these blocks is unlocked with them: final norms, attention pooling, SigLIP's head of texts. Patch, word
    and position embeddings and norms that stand before the blocks stay locked, so that no gradient is computed below.
    """
    if config.lock_image:
        image = model.image_encoder
        _lock(image, image.blocks, config.unlock_last, image.norm, image.attn_pool)
    if config.lock_text:
        text = model.text_encoder
        _lock(text, text.blocks, config.unlock_last, text.final_norm, text.head)


def _lock(tower: nn.Module, blocks: nn.ModuleList, unlock_last: int, *above: nn.Module | None) -> None:
    assert unlock_last < len(blocks)
    tower.requires_grad_(False)
    if unlock_last:
        for module in (*blocks[-unlock_last:], *above):
            if module is not None:
                module.requires_grad_(True)
