"""The model's settings: shapes of the towers, the projections and the instance decoder."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from eclip.setting_rules import ONE_OR_MORE, POSITIVE, ZERO_OR_MORE, Rule, check_settings, flag, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes of the two encoders, the projections and the instance decoder."""

    image_size: int = 96
    """Side of the square input, pixels."""
    patch_size: int = 12
    vision_architecture: Literal["vit", "clip", "siglip"] = "vit"
    """`vit`: ViT and DINOv2. `clip`: a norm before the blocks, no bias on patches. `siglip`: no CLS token; attention
    pooling gives the global feature."""
    vision_width: int = 192
    vision_depth: int = 6
    vision_heads: int = 3
    layer_scale: bool = False
    """Per-channel scales on the residual branches (DINOv2); ImageNet ViTs have none."""
    vision_eps: float = 1e-6
    """Epsilon of the image tower's LayerNorms: 1e-6 in timm and DINOv2; Hugging Face's ViTModel computes with 1e-12."""
    vision_activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    """Between the layers of the image tower's MLPs: `quick_gelu` in OpenAI's CLIP, `gelu_tanh` in SigLIP."""
    pixel_statistics: Literal["imagenet", "half", "clip"] = "imagenet"
    """Pixels are normalised with the mean and deviation of ImageNet (timm, DINOv2) or CLIP, or 0.5 (ViTs from
    ImageNet-21k, SigLIP)."""
    vocab_size: int = 4096
    """Rows of the token embedding; at least the tokenizer's vocabulary."""
    text_architecture: Literal["bert", "clip", "siglip"] = "bert"
    """`clip`: norms before, attention to earlier tokens alone. `siglip`: norms before, texts padded to --max-tokens."""
    text_width: int = 192
    text_depth: int = 4
    text_heads: int = 3
    max_positions: int = 64
    """Rows of the text position embedding; titles are cut to DataConfig.max_tokens."""
    text_activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    text_pooling: Literal["cls", "mean", "last"] = "cls"
    """`cls` as in the paper; `mean` for sentence-transformers towers, `last` for CLIP's and SigLIP's, which were
    trained that way."""
    embed_dim: int = 192
    """D: width of g_I, g_T and of the instance decoder."""
    num_queries: int = 20
    """T: one positive and T-1 negative instance queries."""
    decoder_depth: int = 6
    decoder_heads: int = 12
    """Heads of the self-attention among the queries (slot attention itself is single-headed)."""
    token_norm: bool = True
    """LayerNorm of the patch tokens before the decoder (a choice: the paper names none); keeps score logits near 1."""
    slot_heads: int = 1
    normalize: Literal["mean", "den", "l1max", "sum"] = "den"
    slot_eps: float = 1e-6
    kernels: Literal["auto", "reference"] = "auto"
    """`reference` runs the whole model on plain PyTorch, for comparison."""

    RULES: ClassVar[dict[str, Rule]] = {
        **dict.fromkeys(
            ("image_size", "patch_size", "vision_width", "vision_depth", "vision_heads", "text_width", "text_depth",
             "text_heads", "embed_dim", "decoder_depth", "decoder_heads", "slot_heads"),
            ONE_OR_MORE,
        ),
        "vision_eps": POSITIVE,
        "vocab_size": Rule(low=6, why="five special pieces and one more"),
        "max_positions": Rule(low=3, why="[CLS], one piece and [SEP] need 3"),
        "num_queries": Rule(low=2, why="one positive and one negative are the least"),
        "slot_eps": ZERO_OR_MORE,
    }  # fmt: skip

    @property
    def absorbs_projections(self) -> bool:
        """Whether slot attention moves its queries into token space instead of projecting the tokens.

        At h heads the products with the tokens cost h times as much then, and the tokens are read (from cache) h times:
        at 4 heads 0.2 of the FLOPs of projecting (T=20, N=196, D=768), at 12 heads 0.4. Beyond 4, keys and values are
        built; where exactly the two cross is not measured.
        """
        return self.slot_heads <= 4

    def __post_init__(self) -> None:
        check_settings(self, self.RULES)
        towers = (("vision_width", "vision_heads"), ("text_width", "text_heads"))
        for width, heads in (*towers, ("embed_dim", "decoder_heads"), ("embed_dim", "slot_heads")):
            require(
                getattr(self, width) % getattr(self, heads) == 0,
                f"{width}={getattr(self, width)} does not divide into {heads}={getattr(self, heads)} heads; "
                f"choose a multiple for {flag(width)}",
            )
        last = self.text_architecture != "bert"
        require(
            last == (self.text_pooling == "last"),
            f"text_pooling={self.text_pooling} with text_architecture={self.text_architecture}: that tower was trained "
            f"on its {'last' if last else 'first token or on all'}; set {flag('text_pooling')} to "
            f"{'last' if last else 'cls or mean'}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
            f"use e.g. {max(1, self.image_size // self.patch_size) * self.patch_size}",
        )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size
