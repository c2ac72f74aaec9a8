"""Towers of transformers' CLIPModel and SiglipModel, and of files that open_clip writes, give the same in our model."""

import json

import pytest
import torch
from safetensors.torch import save_file

from eclip.model.eclip import ECLIP
from eclip.model.image_encoder import ImageEncoder
from eclip.model.settings import ModelConfig
from eclip.model.text_encoder import TextEncoder
from eclip.presets import PRESETS
from eclip.weights.flags import told_settings
from eclip.weights.pretrained import load_image_weights, load_text_weights
from eclip.weights.projections import start_projections
from tests.model.tiny import tiny
from tests.weights.hugging_face import hugging_face_clip, hugging_face_siglip, openai_names, saved

EXACT = dict(rtol=0, atol=1e-5)
ODD_CLIP = dict(
    vision=dict(hidden_size=40, num_attention_heads=5, intermediate_size=160, num_hidden_layers=3, image_size=35,
                patch_size=7),
    text=dict(hidden_size=28, num_attention_heads=2, intermediate_size=112, num_hidden_layers=1,
              max_position_embeddings=9),
    dimensions=20,
    hidden_act="gelu",
)  # fmt: skip
ODD_SIGLIP = dict(
    vision=dict(hidden_size=28, num_attention_heads=7, intermediate_size=112, num_hidden_layers=1, image_size=30,
                patch_size=10),
    text=dict(hidden_size=28, num_attention_heads=2, intermediate_size=112, num_hidden_layers=3,
              max_position_embeddings=7),
)  # fmt: skip


def told(path, given=(), preset=PRESETS["debug"].model):
    return told_settings((path, None), (path, None), given, preset)


def written(model, folder, names=dict):
    """The model's weights under other names, and its configuration beside them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file({k: v.clone() for k, v in names(model.state_dict()).items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def started(path, **changes):
    """Our model as the command line makes it: the file's settings, its towers, its projections."""
    model = ECLIP(ModelConfig(**{"vocab_size": 50, "num_queries": 4, "decoder_depth": 1, **told(path), **changes}))
    image = load_image_weights(model.image_encoder, path)
    text = load_text_weights(model.text_encoder, path)
    return model.eval(), start_projections(model, image, text)


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def texts(longest, *, end, pad_to=None):
    """Ids of texts of several lengths, each with its end."""
    generator = torch.Generator().manual_seed(2)
    made = [torch.randint(40, (n,), generator=generator) for n in (longest - 1, 1, 4)]
    made = [torch.cat([text, torch.tensor([end])]) for text in made]
    if pad_to is not None:
        made = [torch.cat([text, torch.full((pad_to - len(text),), 1)]) for text in made]
    return made


def packed(rows):
    return torch.cat(rows), torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32)


def files(model, folder):
    """One CLIP in three guises: modules' names, what save_pretrained writes, open_clip's."""
    model.save_pretrained(folder / "hub")
    return (
        written(model, folder / "modules"),
        folder / "hub" / "model.safetensors",
        written(model, folder / "openai", openai_names),
    )


@pytest.mark.parametrize("shape", [{}, ODD_CLIP])
@torch.no_grad()
def test_clip(tmp_path, shape):
    theirs = hugging_face_clip(**shape)
    size, longest = theirs.config.vision_config.image_size, theirs.config.text_config.max_position_embeddings
    rows = texts(longest, end=49)
    vision = theirs.vision_model(images(size))
    tokens = theirs.vision_model.post_layernorm(vision.last_hidden_state)
    features = theirs.get_image_features(images(size)).pooler_output
    words = torch.cat([theirs.get_text_features(row[None]).pooler_output for row in rows])
    pooled = torch.cat([theirs.text_model(row[None]).pooler_output for row in rows])
    for path in files(theirs, tmp_path):
        ours, lines = started(path)
        assert ours.config.vision_activation == ours.config.text_activation == shape.get("hidden_act", "quick_gelu")
        assert ours.config.embed_dim == theirs.config.projection_dim
        tower = ours.image_tower(images(size))
        torch.testing.assert_close(tower, tokens, **EXACT)
        torch.testing.assert_close(tower[:, 0], vision.pooler_output, **EXACT)
        torch.testing.assert_close(ours.encode_image(images(size)).cls, features, **EXACT)
        torch.testing.assert_close(ours.text_tower(*packed(rows)), pooled, **EXACT)
        torch.testing.assert_close(ours.encode_text(*packed(rows)), words, **EXACT)
        torch.testing.assert_close(ours.scale(), torch.tensor(3.0).exp())
        assert [line.split()[0] for line in lines] == ["g_I", "g_T", "the"], lines


@pytest.mark.parametrize("shape", [{}, ODD_SIGLIP])
@torch.no_grad()
def test_siglip(tmp_path, shape):
    theirs = hugging_face_siglip(**shape)
    size, longest = theirs.config.vision_config.image_size, theirs.config.text_config.max_position_embeddings
    rows = texts(longest, end=1, pad_to=longest)
    vision = theirs.vision_model(images(size))
    words = theirs.get_text_features(torch.stack(rows)).pooler_output
    ours, lines = started(written(theirs, tmp_path))
    tower = ours.image_tower(images(size))
    torch.testing.assert_close(tower[:, 1:], vision.last_hidden_state, **EXACT)
    torch.testing.assert_close(tower[:, 0], vision.pooler_output, **EXACT)
    torch.testing.assert_close(ours.text_tower(*packed(rows)), words, **EXACT)
    # Without projections of its own: the similarities of the two towers are what they were.
    torch.testing.assert_close(ours.encode_image(images(size)).cls, vision.pooler_output, **EXACT)
    torch.testing.assert_close(ours.encode_text(*packed(rows)), words, **EXACT)
    assert lines == ["SigLIP has no projections: g_I and g_T both start as the identity; the logit scale starts anew"]


@torch.no_grad()
def test_siglip_in_open_clips_and_timms_names(tmp_path):
    """open_clip's SigLIP has timm's image tower, whose names are ours, under `visual.trunk.`, and its own of texts."""
    theirs = hugging_face_siglip()
    ours, _ = started(written(theirs, tmp_path / "hub"))

    def names(state):
        text = {k: v for k, v in openai_names(state).items() if "vision" not in k and not k.startswith("logit")}
        image = {f"visual.trunk.{k}": v for k, v in ours.image_encoder.state_dict().items()}
        return {f"text.{k}": v for k, v in text.items()} | image | {"logit_bias": torch.zeros(1)}

    again, _ = started(written(theirs, tmp_path / "timm", names))
    for name, value in ours.state_dict().items():
        if "encoder" in name:
            torch.testing.assert_close(again.state_dict()[name], value, msg=name)


@torch.no_grad()
def test_positions_are_resampled_without_a_cls_row(tmp_path):
    theirs = hugging_face_siglip()
    ours, _ = started(written(theirs, tmp_path), image_size=48)
    expected = theirs.vision_model(images(48), interpolate_pos_encoding=True)
    torch.testing.assert_close(ours.image_tower(images(48))[:, 0], expected.pooler_output, **EXACT)


@torch.no_grad()
def test_the_activation_is_read_and_matters(tmp_path):
    path = written(hugging_face_clip(hidden_act="gelu"), tmp_path)
    ours, _ = started(path)
    other = ECLIP(ModelConfig(**{**told(path), "vocab_size": 50, "vision_activation": "quick_gelu"}))
    with pytest.raises(ValueError, match="vision_activation=quick_gelu; set --vision-activation gelu"):
        load_image_weights(other.image_encoder, path)
    other.image_encoder.load_state_dict(ours.image_encoder.state_dict())
    assert not torch.allclose(other.image_tower(images()), ours.image_tower(images()), atol=1e-3)


def test_what_tensors_do_not_tell_is_asked_for(tmp_path):
    path = saved(hugging_face_clip(), tmp_path)
    with pytest.raises(ValueError, match="does not tell vision_heads: .*config.json.*or give --vision-heads NUMBER"):
        told(path)
    heads = {"vision_heads", "text_heads"}
    with pytest.raises(ValueError, match="does not tell vision_activation.*--vision-activation quick_gelu .* or gelu"):
        told(path, heads)
    every = heads | {"vision_activation", "text_activation"}
    assert told(path, every)["vision_depth"] == 2

    def constants(state):
        state["input_resolution"] = torch.tensor(224)

    assert told(saved(hugging_face_clip(), tmp_path, edit=constants), heads)["text_activation"] == "quick_gelu"
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {"head_width": 8}, "text_cfg": {"heads": 3}},
                    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}})
    )  # fmt: skip
    found = told(path)
    assert (found["vision_heads"], found["text_heads"], found["vision_activation"]) == (4, 3, "gelu")
    assert found["pixel_statistics"] == "half"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    with pytest.raises(ValueError, match="does not tell pixel_statistics.*nearest of imagenet, half, clip"):
        told(path)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "clip", "vision_config": {"num_attention_heads": 8}, "text_config": {}}, (8, "quick_gelu")),
        ({"model_type": "clip_vision_model", "num_attention_heads": 2, "hidden_act": "gelu_new"}, (2, "gelu_tanh")),
        ({"model_type": "altclip", "vision_config": {"num_attention_heads": 2, "hidden_act": "gelu"}}, (2, "gelu")),
        ({"model_type": "siglip", "vision_config": {}}, None),
        ([], None),
    ],
)
def test_configurations_beside(tmp_path, config, found):
    """What it leaves out is its class's default; another model's is none of ours."""
    path = saved(hugging_face_clip(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = () if found else ("vision_heads", "vision_activation")
    settings = told_settings((path, None), None, given, ModelConfig())
    if found:
        assert (settings["vision_heads"], settings["vision_activation"]) == found
    else:
        assert "vision_activation" not in settings


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c["vision_config"].update(hidden_act="relu"), "hidden_act='relu', which is not computed"),
        (lambda c: c["text_config"].update(layer_norm_eps=1e-3), r"layer_norm_eps=0.001 of texts.*with 1e-05"),
    ],
)
def test_other_computations_are_refused(tmp_path, edit, words):
    path = written(hugging_face_clip(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        told(path)


def test_wide_mlps_are_refused(tmp_path):
    path = written(hugging_face_siglip(vision={"intermediate_size": 120}), tmp_path)
    with pytest.raises(ValueError, match=r"MLPs of its tower are 120 wide, read are those of 4 x 32 = 128: SigLIP"):
        told(path)
    with pytest.raises(ValueError, match="120 wide"):
        load_image_weights(ImageEncoder(tiny()), path)


def test_a_configuration_of_another_kind_is_told_its_flags(tmp_path):
    path = written(hugging_face_siglip(), tmp_path)
    with pytest.raises(ValueError, match="--vision-architecture siglip --vision-activation gelu_tanh$"):
        load_image_weights(ImageEncoder(tiny()), path)
    with pytest.raises(ValueError, match="--text-architecture siglip --text-width 32 .*--text-pooling last"):
        load_text_weights(TextEncoder(tiny()), path)


@pytest.mark.parametrize(
    ("tower", "name"),
    [
        ("image", "vision_model.encoder.layers.1.mlp.fc2.bias"),
        ("image", "vision_model.pre_layrnorm.bias"),
        ("text", "text_model.final_layer_norm.bias"),
        ("text", "text_model.encoder.layers.0.self_attn.k_proj.weight"),
    ],
)
@pytest.mark.parametrize("openai", [False, True])
def test_every_tensor_is_there_and_used(tmp_path, tower, name, openai):
    theirs = hugging_face_clip()
    config = told(written(theirs, tmp_path))
    fused = openai and "k_proj" in name

    def lacking(state):
        state = {k: v for k, v in state.items() if k != name} if not fused else dict(state)
        state = openai_names(state) if openai else state
        return {k: v for k, v in state.items() if not fused or "resblocks.0.attn.in_proj_weight" not in k}

    def more(state):
        names = {"image": "visual.extra", "text": "extra"} if openai else {
            "image": "vision_model.extra", "text": "text_model.extra"}  # fmt: skip
        return {**(openai_names(state) if openai else state), names[tower]: torch.zeros(3)}

    model = ECLIP(ModelConfig(**{**config, "vocab_size": 50}))
    load, encoder = {
        "image": (load_image_weights, model.image_encoder),
        "text": (load_text_weights, model.text_encoder),
    }[tower]
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="model.safetensors: no "):
        load(encoder, written(theirs, tmp_path, lacking))
    with pytest.raises(ValueError, match="extra has no place"):
        load(encoder, written(theirs, tmp_path, more))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_projections_of_another_size_stay_and_are_said(tmp_path):
    theirs = hugging_face_clip()
    ours, lines = started(written(theirs, tmp_path), embed_dim=24, decoder_heads=4)
    assert "visual_projection.weight" in lines[0] and "--embed-dim 16 takes it" in lines[0] and len(lines) == 2
    torch.testing.assert_close(ours.scale(), torch.tensor(1 / 0.07))
    ours, (line,) = started(written(hugging_face_siglip(), tmp_path), embed_dim=16, decoder_heads=4)
    assert "one orthogonal matrix (--embed-dim 32" in line
    assert torch.equal(ours.image_projection.weight, ours.text_projection.weight)


def test_a_large_scale_is_clamped(tmp_path):
    theirs = hugging_face_clip()
    theirs.logit_scale.data.fill_(4.7)
    ours, _ = started(written(theirs, tmp_path))
    assert ours.scale().item() == pytest.approx(100)


def test_one_tower_of_a_clip_beside_another_one(tmp_path):
    """The other's shapes stay the preset's, and so does embed_dim."""
    path = written(hugging_face_clip(), tmp_path)
    preset = PRESETS["debug"].model
    settings = told_settings((path, None), None, (), preset)
    assert settings["vision_architecture"] == "clip" and not {"text_width", "embed_dim"} & set(settings)
    model = ECLIP(ModelConfig(**{**vars(preset), **settings, "embed_dim": 16}))
    lines = start_projections(model, load_image_weights(model.image_encoder, path), None)
    assert lines == [f"g_I starts as visual_projection.weight of {path}"]


def test_files_of_other_kinds_tell_nothing(tmp_path):
    from tests.weights.hugging_face import hugging_face_bert, hugging_face_vit

    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no weights")
    vit = saved(hugging_face_vit(), tmp_path)
    assert told_settings((vit, None), (bad, None), (), ModelConfig()) == {}
    bert = saved(hugging_face_bert(), tmp_path)
    assert told_settings((tmp_path / "gone", None), (bert, None), (), ModelConfig()) == {}


def test_patches_of_any_aspect_are_refused(tmp_path):
    def flat(state):
        state["vision_model.embeddings.patch_embedding.weight"] = torch.zeros(32, 192)

    with pytest.raises(ValueError, match="NaFlex"):
        load_image_weights(ImageEncoder(tiny()), saved(hugging_face_siglip(), tmp_path, edit=flat))


def test_a_resnet_is_told(tmp_path):
    names = ["visual.conv1.weight", "visual.layer1.0.conv1.weight", "ln_final.weight"]
    path = tmp_path / "rn50.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    with pytest.raises(ValueError, match="image tower is a ResNet, which is not read here"):
        load_image_weights(ImageEncoder(tiny()), path)
