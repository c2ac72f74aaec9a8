"""Locked towers, whole or but for their last blocks: what trains, is computed backward, is shared and is saved."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from eclip.config import OptimConfig, RunConfig
from eclip.model.eclip import ECLIP
from eclip.presets import PRESETS
from eclip.train import train
from eclip.training.build import build_model
from eclip.training.checkpoint import load_run
from eclip.training.momentum import make_momentum
from eclip.training.optim import check_locks, param_groups
from eclip.training.optim.groups import lr_scales
from eclip.training.step import TrainStep
from tests.helpers import run_torchrun
from tests.training.run_folders import ALONE, assert_refused, make_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

DEPTH = 3


def _config(**changes: object) -> RunConfig:
    base = PRESETS["debug"]
    model = dataclasses.replace(base.model, vision_depth=DEPTH, text_depth=DEPTH)
    return dataclasses.replace(base, model=model, **changes)


def _trained(model: ECLIP, tower: str) -> set[str]:
    return {n.removeprefix(f"{tower}.") for n, p in model.named_parameters() if p.requires_grad and n.startswith(tower)}


def _below(model: ECLIP, tower: str, *starts: str) -> set[str]:
    return {n for n, _ in model.get_submodule(tower).named_parameters() if n.startswith(starts)}


@pytest.mark.parametrize("last", [1, 2])
def test_the_last_blocks_of_a_locked_tower_train(last: int) -> None:
    model = build_model(_config(lock_image=True, lock_text=True, unlock_last=last))
    blocks = [f"blocks.{i}." for i in range(DEPTH - last, DEPTH)]
    assert _trained(model, "image_encoder") == _below(model, "image_encoder", *blocks, "norm.")
    # BERT's `norm` stands before the blocks: an embedding's.
    assert _trained(model, "text_encoder") == _below(model, "text_encoder", *blocks)
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith(("image_enc", "text_enc")))


def test_only_locked_towers_are_meant() -> None:
    model = build_model(_config(lock_image=True, unlock_last=1))
    assert len(_trained(model, "text_encoder")) == len(list(model.text_encoder.parameters()))
    whole = build_model(_config(lock_image=True, lock_text=True))
    assert not _trained(whole, "image_encoder") and not _trained(whole, "text_encoder")


@pytest.mark.parametrize(
    ("flag", "locks"), [("--lock-image", {"lock_image": True}), ("--lock-text", {"lock_text": True})]
)
def test_unlocking_every_block_is_no_lock(flag: str, locks: dict[str, bool], tmp_path: Path) -> None:
    check_locks(_config(**locks, unlock_last=DEPTH - 1))
    with pytest.raises(ValueError, match=f"--unlock-last {DEPTH} with {flag}: .* .depth {DEPTH}.; drop {flag}, or"):
        check_locks(_config(**locks, unlock_last=DEPTH))
    config = make_config(tmp_path, tmp_path / "run", **locks, unlock_last=9)
    assert_refused(config, f"--unlock-last 9 with {flag}")


def test_backward_stops_above_the_locked_blocks() -> None:
    model = build_model(_config(lock_image=True, lock_text=True, unlock_last=1))
    needs: dict[str, bool] = {}
    for tower in (model.image_encoder, model.text_encoder):
        for i, block in enumerate(tower.blocks):
            name = f"{type(tower).__name__}.{i}"
            block.register_forward_hook(lambda _, x, y, name=name: needs.update({name: y.requires_grad}))
    image = model.encode_image(torch.randn(2, 3, 32, 32)).cls
    text = model.encode_text(torch.tensor([2, 7, 3, 2, 3]), torch.tensor([0, 3, 5], dtype=torch.int32))
    (image.sum() + text.sum()).backward()
    for tower in ("ImageEncoder", "TextEncoder"):
        assert [needs[f"{tower}.{i}"] for i in range(DEPTH)] == [False, False, True]
    locked = [p for p in model.parameters() if not p.requires_grad]
    assert locked and all(p.grad is None for p in locked)


def test_locked_parts_are_shared_with_the_momentum_model_and_stay_in_eval_mode() -> None:
    config = _config(lock_image=True, unlock_last=1)
    model = build_model(config)
    momentum = make_momentum(model)
    own = dict(model.named_parameters())
    for name, parameter in momentum.named_parameters():
        assert (parameter is own[name]) == (not own[name].requires_grad), name
    # Whole modules where there are some: FSDP2 shards a module's parameters once.
    assert momentum.image_encoder is not model.image_encoder
    shared = [a is b for a, b in zip(momentum.image_encoder.blocks, model.image_encoder.blocks, strict=True)]
    assert shared == [True, True, False]
    assert momentum.image_encoder.patch_embed is model.image_encoder.patch_embed
    TrainStep(model, momentum, config, ALONE).train()
    modes = [block.training for block in model.image_encoder.blocks]
    assert modes == [False, False, True]
    assert model.image_encoder.norm.training and model.text_encoder.training
    assert not model.image_encoder.patch_embed.proj.training


def test_a_run_changes_the_unlocked_blocks_alone_and_resumes(twelve_products: Path, tmp_path: Path) -> None:
    changes = {"lock_image": True, "lock_text": True, "unlock_last": 1, "vision_depth": DEPTH, "text_depth": DEPTH}
    config = make_config(twelve_products, tmp_path, **changes, steps=4, checkpoint_every=2)
    assert train(config, ALONE)
    trained, saved, _ = load_run(tmp_path)
    start = build_model(saved)
    free = {n for n, p in start.named_parameters() if p.requires_grad}
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed == free
    optimized = {id(p) for g in param_groups(start, saved.optim) for p in g["params"]}
    assert optimized == {id(start.get_parameter(n)) for n in free}
    # From the middle to the same weights, momentum model and all.
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    assert train(dataclasses.replace(config, resume=True), ALONE)
    resumed, _, _ = load_run(tmp_path)
    for name, parameter in resumed.named_parameters():
        torch.testing.assert_close(parameter, trained.get_parameter(name), rtol=1e-5, atol=1e-7, msg=name)
    with pytest.raises(ValueError, match="another unlock_last"):
        train(dataclasses.replace(config, steps=6, resume=True, unlock_last=2), ALONE)


RANKS = """
import dataclasses, gc, sys
from pathlib import Path
import torch
from eclip.parallel.ranks import find_ranks, part, start_ranks
from eclip.train import train
from tests.training.run_folders import make_config

ranks = start_ranks(find_ranks(timeout=60))
changes = {"lock_image": True, "lock_text": True, "unlock_last": 1, "vision_depth": 3, "text_depth": 3}
for shard in ("full", "none"):
    assert train(make_config(Path(sys.argv[1]), Path(sys.argv[2], shard), shard=shard, **changes), ranks)
    gc.collect()
part(ranks)
print(f"rank {ranks.rank} done", flush=True)
"""


def _learnt(model: ECLIP, start: ECLIP, name: str) -> torch.Tensor:
    """By how much a parameter moved, without the keys' bias: a constant added to all keys changes no softmax, and Adam
    makes steps of the rounding errors that this bias has for a gradient."""
    moved = model.get_parameter(name).detach() - start.get_parameter(name).detach()
    if name.endswith("attn.qkv.bias"):
        query, _, value = moved.chunk(3)
        return torch.cat([query, value])
    return moved


def test_two_ranks_train_the_unlocked_blocks_as_one_does(twelve_products: Path, tmp_path: Path) -> None:
    output = run_torchrun(RANKS, str(twelve_products), str(tmp_path))
    assert "rank 1 done" in output
    changes = {"lock_image": True, "lock_text": True, "unlock_last": 1, "vision_depth": DEPTH, "text_depth": DEPTH}
    assert train(make_config(twelve_products, tmp_path / "one", **changes), ALONE)
    one, saved, _ = load_run(tmp_path / "one")
    start = build_model(saved)
    for shard in ("full", "none"):
        two = load_run(tmp_path / shard)[0]
        for name, parameter in start.named_parameters():
            moved = _learnt(one, start, name)
            torch.testing.assert_close(_learnt(two, start, name), moved, rtol=0.05, atol=2e-6, msg=name)
            assert bool(moved.any()) == parameter.requires_grad, name


def test_what_stands_above_the_blocks_of_clip_and_siglip() -> None:
    """Final norms, SigLIP's pooling and head train with the last block, and learn as fast as what follows the tower."""
    config = _config(lock_image=True, lock_text=True, unlock_last=1)
    model = dataclasses.replace(
        config.model, vision_architecture="siglip", text_architecture="siglip", text_pooling="last", max_positions=55
    )
    built = build_model(dataclasses.replace(config, model=model))
    assert _trained(built, "image_encoder") == _below(built, "image_encoder", "blocks.2.", "norm.", "attn_pool.")
    assert _trained(built, "text_encoder") == _below(built, "text_encoder", "blocks.2.", "final_norm.", "head.")
    clip = dataclasses.replace(model, vision_architecture="clip", text_architecture="clip")
    built = build_model(dataclasses.replace(config, model=clip))
    assert _trained(built, "image_encoder") == _below(built, "image_encoder", "blocks.2.", "norm.")
    assert _trained(built, "text_encoder") == _below(built, "text_encoder", "blocks.2.", "final_norm.")
    scales = lr_scales(built, OptimConfig(layer_decay=0.5))
    assert scales["image_encoder.norm.weight"] == scales["text_encoder.final_norm.weight"] == 1
    assert scales["image_encoder.norm_pre.weight"] == scales["text_encoder.word_embedding.weight"] == 0.5 ** (DEPTH + 1)
