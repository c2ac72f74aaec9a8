"""The five losses of ECLIP (arXiv 2304.02853, section 3).

    L_itc    symmetric InfoNCE between g_I(v_cls) and g_T(w_cls)                              contrast.py
    L_inter  InfoNCE between the positive query's output on image a and the momentum model's
             on image b of the product                                                        contrast.py
    L_itm    binary matching of the instance embedding with its title and with a hard title   matching.py
    L_intra  per image, cross-entropy over the T query outputs: which of them is what the
             title speaks of                                                                  intra_product.py
    L_R      entropy of the assignment of image tokens to queries                             the decoder's own

L_itc and L_inter couple the rows of a batch, and so do prompts, which come from other rows; all else is per row.

Letters: B products of this rank, G of the global batch, T queries, D embedding width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.model.instance_decoder import IMAGE, TEXT
from eclip.objectives.contrast import image_text_loss, inter_product_loss, unit
from eclip.objectives.draws import PromptDraw, build_prompts, draw_prompts, gaussian_prompts, take_query
from eclip.objectives.intra_product import intra_product_loss
from eclip.objectives.matching import matching_loss
from eclip.objectives.objective import Encoded, Local, Objective
from eclip.objectives.views import CachedFeatures, encode_view


class EclipObjective(Objective):
    """View a by the model, view b by the momentum model; each one's prompts are the other's and other products'."""

    views = 2
    needs_momentum = True

    @property
    def trains_decoder(self) -> bool:
        """L_R alone sharpens it but teaches it nothing."""
        return max(self.config.inter_weight, self.config.itm_weight, self.config.intra_weight) > 0

    def check_batch(self, global_batch_size: int, num_queries: int) -> None:
        if global_batch_size < num_queries:
            raise ValueError(
                f"global_batch_size={global_batch_size} cannot prompt {num_queries} queries with distinct products; "
                f"set --global-batch-size to at least {num_queries} or lower --num-queries"
            )

    def weights(self, step: int) -> dict[str, float]:
        config = self.config
        ramp = min(1.0, (step + 1) / config.decoder_warmup_steps) if config.decoder_warmup_steps else 1.0
        return {
            "itc": config.itc_weight,
            "inter": ramp * config.inter_weight,
            "itm": ramp * config.itm_weight,
            "intra": ramp * config.intra_weight,
            "entropy": ramp * config.entropy_weight,
        }

    def features(
        self,
        model: ECLIP,
        momentum: ECLIP | None,
        batch: Batch,
        cached: CachedFeatures | None,
        *,
        step: int,
        seed: int,
    ) -> Encoded:
        assert momentum is not None, "the ECLIP objective needs the momentum model"
        keep = self.config.token_keep
        a = encode_view(model, batch, cached, 0, token_keep=keep, step=step, seed=seed)
        pairs = {"image": unit(a.image.cls), "text": unit(a.text)}
        with torch.no_grad():
            b = encode_view(momentum, batch, cached, 1, token_keep=keep, step=step, seed=seed)
        pool = {
            "text_a": a.text,
            "image_a": a.image.cls,
            "text_b": b.text,
            "image_b": b.image.cls,
            "product": batch.product_ids,
            "title": batch.title_ids[:, 0],
        }
        return Encoded(views=(a, b), pairs=pairs, pool=pool)

    def local_losses(
        self,
        model: ECLIP,
        momentum: ECLIP | None,
        batch: Batch,
        encoded: Encoded,
        pool: dict[str, Tensor],
        *,
        step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Local:
        assert momentum is not None, "the ECLIP objective needs the momentum model"
        a, b = encoded.views
        where = {"seed": seed, "step": step, "rank": rank, "world_size": world_size}
        num_queries, width = model.config.num_queries, model.config.embed_dim
        draw = draw_prompts(len(a.text), num_queries, self.config, **where).to(a.text.device)
        noise = gaussian_prompts(num_queries, width, seed=seed, step=step).to(a.text)
        # One pass of each encoder a branch: the other branch's (detached) image feature is this branch's image prompt.
        own, image_a, image_b = draw.own_image[:, None], a.image.cls.detach(), b.image.cls
        with torch.no_grad():
            image_prompts = torch.where(own, image_b, image_a)
            prompts = build_prompts(draw, pool["text_b"], pool["image_a"], noise, b.text, image_prompts)
            keys = take_query(momentum.decode(b.image.tokens, prompts, draw.modality).slots, draw.positive)
        image_prompts = torch.where(own, image_a, image_b)
        prompts = build_prompts(draw, pool["text_a"], pool["image_b"], noise, a.text, image_prompts)
        output = model.decode(a.image.tokens, prompts, draw.modality)
        instances = take_query(output.slots, draw.positive)
        pairs = {"instance": unit(instances), "key": unit(keys)}
        excluded = _same_title_or_product(batch, draw, pool)
        losses = {
            "itm": matching_loss(model, instances, a.text, pool["text_a"], draw, excluded, **where),
            "intra": intra_product_loss(output.slots, a.text, draw.positive, excluded, self.config.intra_temperature),
            "entropy": output.entropy,
        }
        return Local(losses=losses, pairs=pairs)

    def pair_losses(
        self, model: ECLIP, pairs: dict[str, Tensor], batch: Batch, *, group: dist.ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        temperature = self.config.inter_temperature
        return {
            "itc": image_text_loss(model, pairs["image"], pairs["text"], batch, self.config, group),
            "inter": inter_product_loss(model, pairs["instance"], pairs["key"], batch, temperature, group),
        }

    def embed(self, model: ECLIP, image: ImageFeatures, text: Tensor) -> dict[str, Tensor]:
        found = super().embed(model, image, text)
        if self.trains_decoder:
            by_image = model.decode_queries(image.tokens, model.instance_queries(image.cls, IMAGE))
            by_text = model.decode_queries(image.tokens, model.instance_queries(text, TEXT), return_map=True)
            # Slot 0 is the positive query.
            found["instance_image"] = F.normalize(by_image.slots[:, 0], dim=-1)
            found["instance_text"] = F.normalize(by_text.slots[:, 0], dim=-1)
            assert by_text.assignment is not None
            found["instance_map"] = by_text.assignment[:, 0]
        return found


def _same_title_or_product(batch: Batch, draw: PromptDraw, pool: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: negatives that carry the row's own title or product, which are no negatives at all."""
    products = pool["product"][draw.products] == batch.product_ids[:, None]
    titles = pool["title"][draw.products] == batch.title_ids[:, :1]
    return (products | titles).scatter(1, draw.positive[:, None], False)
