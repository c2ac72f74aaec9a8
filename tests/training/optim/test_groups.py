"""Parameter groups: what decays, what learns slower."""

import dataclasses

import pytest

from eclip.config import OptimConfig
from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.training.optim import build_optimizer, param_groups, set_learning_rate
from eclip.training.optim.groups import decays, lr_scales

CONFIG = OptimConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.05, tower_learning_rate_scale=0.1)


@pytest.fixture(scope="module")
def model() -> ECLIP:
    return ECLIP(PRESETS["debug"].model)


def _names(model: ECLIP, *, lr_scale: float, decayed: bool) -> set[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups(model, CONFIG)
    found = [g for g in groups if g["lr_scale"] == lr_scale and (g["weight_decay"] > 0) == decayed]
    assert len(found) <= 1
    return {names[id(p)] for g in found for p in g["params"]}


def test_groups_cover_every_parameter_once(model: ECLIP) -> None:
    grouped = [p for g in param_groups(model, CONFIG) for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_no_decay_on_norms_biases_scale_and_embeddings_of_place(model: ECLIP) -> None:
    free = _names(model, lr_scale=1.0, decayed=False) | _names(model, lr_scale=0.1, decayed=False)
    for name, parameter in model.named_parameters():
        special = ("norm" in name, name.endswith("bias"), "scale" in name, "pos" in name, "cls_token" in name)
        assert (name in free) == (any(special) or name in ("queries.position", "queries.modality")), name
        assert name in free or parameter.ndim >= 2


def test_towers_learn_slower(model: ECLIP) -> None:
    slow = _names(model, lr_scale=0.1, decayed=True) | _names(model, lr_scale=0.1, decayed=False)
    assert slow == {n for n, _ in model.named_parameters() if n.startswith(("image_encoder.", "text_encoder."))}
    optimizer = build_optimizer(model, CONFIG)
    set_learning_rate(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.5, 0.05}


def test_locked_parameters_are_left_out() -> None:
    model = ECLIP(PRESETS["debug"].model)
    model.image_encoder.requires_grad_(False)
    grouped = {id(p) for g in param_groups(model, CONFIG) for p in g["params"]}
    assert not grouped & {id(p) for p in model.image_encoder.parameters()}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="locked"):
        param_groups(model, CONFIG)


def test_layers_learn_slower_the_lower_they_lie() -> None:
    """As BEiT and MAE count: what follows the blocks, then each block below it, then the embeddings."""
    config = dataclasses.replace(CONFIG, layer_decay=0.5)
    shape = dataclasses.replace(PRESETS["debug"].model, vision_depth=3, text_depth=2)
    model = ECLIP(shape)
    scales = lr_scales(model, config)
    assert set(scales) == {n for n, _ in model.named_parameters()}
    for name, scale in scales.items():
        tower, _, rest = name.partition(".")
        if tower not in ("image_encoder", "text_encoder"):
            assert scale == 1.0, name
            continue
        depth = 3 if tower == "image_encoder" else 2
        if rest.startswith("blocks."):
            above = depth - int(rest.split(".")[1])
        else:
            above = 0 if name.startswith("image_encoder.norm.") else depth + 1
        assert scale == 0.1 * 0.5**above, name
    embeddings = ("image_encoder.patch_embed.proj.weight", "image_encoder.cls_token", "image_encoder.pos_embed")
    assert {scales[name] for name in embeddings} == {0.1 / 16}
    assert scales["text_encoder.norm.weight"] == scales["text_encoder.word_embedding.weight"] == 0.1 / 8

    groups = param_groups(model, config)
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert len(groups) == len({(g["lr_scale"], g["weight_decay"]) for g in groups})
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(scales[names[id(p)]] == g["lr_scale"] for g in groups for p in g["params"])
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 2.0)
    assert {g["lr"] for g in optimizer.param_groups} == {2 * g["lr_scale"] for g in groups}


def test_without_layer_decay_groups_are_the_four_of_old(model: ECLIP) -> None:
    """In the order of the parameters, so that sums over them add up as they always did."""
    expected: dict[tuple[float, float], list[int]] = {}
    for name, parameter in model.named_parameters():
        lr_scale = 0.1 if name.startswith(("image_encoder.", "text_encoder.")) else 1.0
        expected.setdefault((lr_scale, 0.05 if decays(name, parameter) else 0.0), []).append(id(parameter))
    groups = param_groups(model, CONFIG)
    assert {(g["lr_scale"], g["weight_decay"]): [id(p) for p in g["params"]] for g in groups} == expected
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == list(expected)
    assert len(expected) == 4


def test_matrices_of_blocks_are_muons(model: ECLIP) -> None:
    config = dataclasses.replace(CONFIG, optimizer="muon")
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = {names[id(p)] for g in param_groups(model, config) if g["muon"] for p in g["params"]}
    assert matrices == {
        n for n, p in model.named_parameters() if ".blocks." in n and n.endswith(".weight") and p.ndim == 2
    }
    assert {n.split(".")[0] for n in matrices} == {"image_encoder", "text_encoder", "instance_decoder"}
    assert not any(g["muon"] for g in param_groups(model, CONFIG))
