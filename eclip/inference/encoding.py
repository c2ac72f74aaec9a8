"""One pass of the image tower, then as many prompts as are asked: what search, export and serving stand on.

Letters: n images, m texts, N patch tokens, D embedding width, S side of the square image.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.dataloading.text import Tokenizer
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.model.instance_decoder import IMAGE, TEXT

__all__ = ["IMAGE", "TEXT", "EncodedImages", "Encoder", "Instances"]


@dataclass(frozen=True)
class EncodedImages:
    """What the tower made of n images; on the model's device, not normalised."""

    features: ImageFeatures
    sizes: list[tuple[int, int]]
    """Width and height of each upright image, pixels."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def vectors(self) -> Tensor:
        """(n, D) unit global embeddings."""
        return F.normalize(self.features.cls.float(), dim=-1)


@dataclass(frozen=True)
class Instances:
    """What n images hold of their prompts."""

    vectors: Tensor
    """(n, D) unit instance embeddings."""
    maps: Tensor
    """(n, N) float32, the share of each patch that the prompt's query took from the others."""


class Encoder:
    """A model and its tokenizer, asked in tensors. Threads may share it: nothing in it changes."""

    def __init__(self, model: ECLIP, tokenizer: Tokenizer, *, max_tokens: int, trains_decoder: bool) -> None:
        """model: in eval mode, on its device. trains_decoder: False for one that was trained without (--objective
        clip): it has global embeddings alone."""
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.has_decoder = trains_decoder

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.logit_scale.device

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.model.config.embed_dim

    @property
    def image_size(self) -> int:
        """S, pixels."""
        return self.model.config.image_size

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of weights, settings and vocabulary: vectors of two models of one fingerprint can be compared."""
        settings = dataclasses.asdict(self.model.config)
        settings.pop("kernels")
        digest = hashlib.sha256(json.dumps([settings, self.max_tokens, self.tokenizer.vocabulary()]).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(m, D) features of texts, NOT normalised: they are prompts, too."""
        tokens, cu_seqlens = self.tokenizer.encode(list(texts), self.max_tokens)
        return self.model.encode_text(tokens.to(self.device), cu_seqlens.to(self.device)).float()

    @torch.inference_mode()
    def images(self, squares: Tensor, sizes: Sequence[tuple[int, int]]) -> EncodedImages:
        """squares: (n, 3, S, S) uint8 RGB, of images of these sizes (width, height)."""
        return EncodedImages(self.model.encode_image(squares.to(self.device)), list(sizes))

    @torch.inference_mode()
    def instances(self, images: EncodedImages, prompts: Tensor, modality: int) -> Instances:
        """Decode each image with its prompt (n, D): features of texts (modality TEXT) or of images (IMAGE), any length.

        Raises ValueError for a model without a trained decoder.
        """
        self.require_decoder()
        queries = self.model.instance_queries(prompts.to(self.device), modality)
        found = self.model.decode_queries(images.features.tokens, queries, return_map=True)
        assert found.assignment is not None
        # Slot 0 is the positive query.
        return Instances(F.normalize(found.slots[:, 0].float(), dim=-1), found.assignment[:, 0])

    @torch.inference_mode()
    def cosine_maps(self, images: EncodedImages, prompts: Tensor) -> Tensor:
        """(n, N) cosine of each patch token with the image's prompt (n, D): the map of a model without a decoder."""
        tokens = F.normalize(images.features.tokens.float(), dim=-1)
        return torch.einsum("bnd,bd->bn", tokens, F.normalize(prompts.to(self.device).float(), dim=-1))

    def maps(self, images: EncodedImages, prompts: Tensor, modality: int) -> Tensor:
        """(n, N) where each image shows its prompt: the decoder's share of each patch, or cosines without a decoder."""
        if self.has_decoder:
            return self.instances(images, prompts, modality).maps
        return self.cosine_maps(images, prompts)

    @torch.inference_mode()
    def match(self, instances: Tensor, texts: Tensor) -> Tensor:
        """(n,) probability, by the matching head, that text i belongs to instance i; both (n, D), any length.

        What the head was trained on: an instance prompted by its own title, against titles (objectives/matching.py).
        """
        self.require_decoder()
        unit = F.normalize(instances.to(self.device).float(), dim=-1) * F.normalize(
            texts.to(self.device).float(), dim=-1
        )
        return self.model.match(unit * self.embed_dim).float().softmax(-1)[:, 1]

    def require_decoder(self) -> None:
        """Raise ValueError for a model that was trained without the instance decoder."""
        if not self.has_decoder:
            raise ValueError(
                "this model was trained without the instance decoder (--objective clip): it has global embeddings and "
                "cosine maps alone; leave prompts out, or take a run of --objective eclip"
            )
