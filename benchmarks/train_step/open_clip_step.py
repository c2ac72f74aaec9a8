"""The peer of another model: CLIP's ViT-B-16, as open_clip trains it.

Its step is smaller: one view of an image, one pass, a text tower of half our depth and width on 77 padded tokens, no
momentum model, no decoder. So times are not to be compared, shares of the GPU's peak are. Needs the package
open_clip_torch, which is imported when a step is made.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from eclip.config import RunConfig

MODEL, IMAGE_SIZE, TOKENS, VOCABULARY = "ViT-B-16", 224, 77, 49408


class OpenClipStep:
    """One training step at a call: `--precision amp_bf16`, AdamW with open_clip's defaults."""

    def __init__(self, config: RunConfig, device: torch.device, *, model: str = MODEL, image_size: int = IMAGE_SIZE):
        """Raises ImportError where open_clip is missing."""
        open_clip: Any = importlib.import_module("open_clip")
        torch.manual_seed(config.seed)
        self.bf16 = config.bf16 and device.type == "cuda"
        self.model = open_clip.create_model(model, pretrained=None, device=device).train()
        self.loss = open_clip.ClipLoss()
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.2}],
            lr=config.optim.learning_rate,
            betas=(0.9, 0.98),
            eps=1e-6,
            fused=True,  # open_clip's own default is slower
        )
        numbers, count = torch.Generator().manual_seed(0), config.global_batch_size
        images = torch.randn(count, 3, image_size, image_size, generator=numbers)  # its loader normalises
        self.images = images.to(device)
        self.texts = torch.randint(1, VOCABULARY, (count, TOKENS), generator=numbers).to(device)

    def losses_and_gradients(self) -> Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
            image, text, scale = self.model(self.images, self.texts)[:3]
            loss: Tensor = self.loss(image, text, scale)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.losses_and_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        return loss
