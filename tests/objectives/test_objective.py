"""What the trainer and evaluation ask of an objective."""

import pytest
import torch
import torch.nn.functional as F

from eclip.model.eclip import ECLIP
from eclip.model.instance_decoder import IMAGE, TEXT
from eclip.objectives.clip import ClipObjective
from eclip.objectives.eclip import EclipObjective
from eclip.objectives.objective import make_objective
from eclip.objectives.settings import ObjectiveConfig
from tests.model.tiny import TINY
from tests.objectives.batches import B, make_batch

CLIP, ECLIP_ = ObjectiveConfig(objective="clip"), ObjectiveConfig()


def test_the_settings_name_the_objective() -> None:
    assert make_objective(CLIP) == ClipObjective(CLIP)
    assert make_objective(ECLIP_) == EclipObjective(ECLIP_)


def test_what_the_two_ask_for() -> None:
    clip, eclip = make_objective(CLIP), make_objective(ECLIP_)
    assert (clip.views, clip.text, clip.needs_momentum) == (1, "pooled", False)
    assert (eclip.views, eclip.text, eclip.needs_momentum) == (2, "pooled", True)


@pytest.mark.parametrize("config", [CLIP, ECLIP_], ids=["clip", "eclip"])
def test_a_locked_part_gets_no_gradient_and_every_other_does(model: ECLIP, config: ObjectiveConfig) -> None:
    objective = make_objective(config)
    objective.lock_unused(model)
    draws = objective.draw(B, range(B), TINY, step=0, seed=0)
    objective.losses(model, model, make_batch(), draws)["loss"].backward()
    for name, parameter in model.named_parameters():
        unused = name.split(".")[0] in ("queries", "instance_decoder", "matching_head") and config is CLIP
        assert parameter.requires_grad != unused, name
        assert (parameter.grad is None) == unused, name


def test_a_batch_smaller_than_the_queries_is_refused_by_eclip_alone() -> None:
    make_objective(CLIP).check_batch(4, 5)
    make_objective(ECLIP_).check_batch(5, 5)
    with pytest.raises(ValueError, match="^global_batch_size=4 cannot prompt 5 .*to at least 5 or lower"):
        make_objective(ECLIP_).check_batch(4, 5)


@pytest.mark.parametrize("name", ["inter", "itm", "intra"])
def test_each_of_three_losses_trains_the_decoder(name: str) -> None:
    none = dict.fromkeys(("inter_weight", "itm_weight", "intra_weight"), 0.0)
    assert not make_objective(ObjectiveConfig(**none)).trains_decoder
    assert make_objective(ObjectiveConfig(**{**none, f"{name}_weight": 0.1})).trains_decoder
    assert not make_objective(CLIP).trains_decoder


def test_embedding_is_what_the_model_says_of_images_and_titles(model: ECLIP) -> None:
    model.eval()
    batch = make_batch()
    assert batch.images is not None
    image = model.encode_image(batch.images[:, 0])
    text = torch.randn(len(image.cls), TINY.embed_dim)
    found = make_objective(ECLIP_).embed(model, image, text)
    only_global = make_objective(CLIP).embed(model, image, text)
    assert list(only_global) == ["global_image", "text", "global_map"]
    assert [name for name in found if name not in only_global] == ["instance_image", "instance_text", "instance_map"]
    assert all(torch.equal(found[name], value) for name, value in only_global.items())
    torch.testing.assert_close(found["global_image"], F.normalize(image.cls, dim=-1))
    torch.testing.assert_close(found["global_map"], F.cosine_similarity(image.tokens, text[:, None], dim=-1))
    for name, prompt, modality in (("instance_image", image.cls, IMAGE), ("instance_text", text, TEXT)):
        output = model.decode_queries(image.tokens, model.instance_queries(prompt, modality), return_map=True)
        torch.testing.assert_close(found[name], F.normalize(output.slots[:, 0], dim=-1))
    assert output.assignment is not None
    torch.testing.assert_close(found["instance_map"], output.assignment[:, 0])
