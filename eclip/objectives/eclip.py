"""The five losses of ECLIP (arXiv 2304.02853, section 3).

    L_itc    symmetric InfoNCE between g_I(v_cls) and g_T(w_cls)                              contrast.py
    L_inter  InfoNCE between the positive query's output on image a and the momentum model's
             on image b of the product                                                        contrast.py
    L_itm    binary matching of the instance embedding with its title and with a hard title   matching.py
    L_intra  per image, cross-entropy over the T query outputs: which of them is what the
             title speaks of                                                                  intra_product.py
    L_R      entropy of the assignment of image tokens to queries                             the decoder's own

L_itc couples the rows of a batch. So do prompts, which come from other rows, and the keys of L_inter; but those carry
no gradient: given them, all losses but L_itc are means over rows.

Letters: B products of this rank or micro-batch, G of the global batch, T queries, D embedding width.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.dataloading.schema import Batch
from eclip.model.eclip import ECLIP, ImageFeatures
from eclip.model.instance_decoder import IMAGE, TEXT
from eclip.model.settings import ModelConfig
from eclip.objectives.contrast import inter_product_loss, unit
from eclip.objectives.draws import Draws, PromptDraw, build_prompts, draw_prompts, gaussian_prompts, take_query
from eclip.objectives.intra_product import intra_product_loss
from eclip.objectives.matching import matching_loss
from eclip.objectives.objective import Objective
from eclip.objectives.views import View


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
                f"set --global-batch-size, or every size of --batch-schedule, to at least {num_queries} or lower "
                f"--num-queries"
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

    def draw(self, total: int, rows: range, model: ModelConfig, *, step: int, seed: int) -> Draws:
        return dataclasses.replace(
            super().draw(total, rows, model, step=step, seed=seed),
            prompts=draw_prompts(total, rows, model.num_queries, self.config, seed=seed, step=step),
            noise=gaussian_prompts(model.num_queries, model.embed_dim, seed=seed, step=step),
        )

    def pool(self, view: View, other: View | None, batch: Batch) -> dict[str, Tensor]:
        assert other is not None, "the ECLIP objective needs the momentum model"
        return {
            "text_a": view.text,
            "image_a": view.image.cls,
            "text_b": other.text,
            "image_b": other.image.cls,
            "product": batch.product_ids,
            "title": batch.title_ids[:, 0],
        }

    @torch.no_grad()
    def targets(
        self, momentum: ECLIP | None, other: View | None, pool: dict[str, Tensor], draws: Draws
    ) -> dict[str, Tensor]:
        assert momentum is not None, "the ECLIP objective needs the momentum model"
        assert other is not None
        draw, noise = _prompts(draws, pool)
        # One pass of each encoder a branch: the other branch's (detached) image feature is this branch's image prompt.
        image_prompts = torch.where(draw.own_image[:, None], other.image.cls, _own(pool["image_a"], draws))
        prompts = build_prompts(draw, pool["text_b"], pool["image_a"], noise, other.text, image_prompts)
        keys = take_query(momentum.decode(other.image.tokens, prompts, draw.modality).slots, draw.positive)
        return {"key": unit(keys)}

    def local_losses(
        self,
        model: ECLIP,
        batch: Batch,
        view: View,
        pool: dict[str, Tensor],
        targets: dict[str, Tensor],
        draws: Draws,
        *,
        observe: bool = False,
    ) -> dict[str, Tensor]:
        draw, noise = _prompts(draws, pool)
        own_image = view.image.cls.detach()
        image_prompts = torch.where(draw.own_image[:, None], own_image, _own(pool["image_b"], draws))
        prompts = build_prompts(draw, pool["text_a"], pool["image_b"], noise, view.text, image_prompts)
        output = model.decode(view.image.tokens, prompts, draw.modality, return_map=observe)
        instances = take_query(output.slots, draw.positive)
        unit_instances = unit(instances)
        excluded = _same_title_or_product(batch, draw, pool)
        losses = {
            "itm": matching_loss(model, instances, view.text, pool["text_a"], draw, excluded),
            "intra": intra_product_loss(
                output.slots, view.text, draw.positive, excluded, self.config.intra_temperature
            ),
            "entropy": output.entropy,
            "inter": inter_product_loss(
                unit_instances,
                targets["key"],
                pool["product"],
                self.config.inter_temperature,
                first=draws.first,
                kernels=model.config.kernels,
            ),
        }
        if observe:
            assert output.assignment is not None
            losses["positive_share"] = take_query(output.assignment, draw.positive).mean()
        return losses

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


def _prompts(draws: Draws, pool: dict[str, Tensor]) -> tuple[PromptDraw, Tensor]:
    assert draws.prompts is not None
    assert draws.noise is not None
    return draws.prompts, draws.noise.to(pool["text_a"])


def _own(pool: Tensor, draws: Draws) -> Tensor:
    """Of the pool (G, D) of all rows those that `draws` are for."""
    assert draws.prompts is not None
    return pool[draws.first : draws.first + len(draws.prompts.positive)]


def _same_title_or_product(batch: Batch, draw: PromptDraw, pool: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: negatives that carry the row's own title or product, which are no negatives at all."""
    products = pool["product"][draw.products] == batch.product_ids[:, None]
    titles = pool["title"][draw.products] == batch.title_ids[:, :1]
    return (products | titles).scatter(1, draw.positive[:, None], False)
