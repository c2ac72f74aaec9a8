"""The seams that training, evaluation and the feature cache hold on to."""

import pytest
import torch

from eclip.model.eclip import ECLIP
from tests.model.tiny import tiny


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ECLIP(tiny()).eval()


def test_encoders_are_tower_then_projection(model):
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    features = model.encode_image(images)
    tower = model.image_tower(images)
    assert (features.cls.shape, features.tokens.shape, tower.shape) == ((3, 16), (3, 16, 16), (3, 17, 32))
    torch.testing.assert_close(features.cls, model.image_projection(tower[:, 0]))
    torch.testing.assert_close(features.tokens, model.project_image(tower).tokens)
    kept = torch.tensor([2, 5])
    assert model.image_tower(images, kept).shape == (3, 3, 32)
    some = model.encode_image(images, kept).tokens
    torch.testing.assert_close(some, model.image_projection(model.image_tower(images, kept)[:, 1:]))
    tokens, cu_seqlens = torch.arange(7), torch.tensor([0, 3, 7], dtype=torch.int32)
    assert model.text_tower(tokens, cu_seqlens).shape == (2, 24)
    torch.testing.assert_close(
        model.encode_text(tokens, cu_seqlens), model.project_text(model.text_tower(tokens, cu_seqlens))
    )
    told = model.encode_text(tokens, cu_seqlens, longest=6)
    torch.testing.assert_close(told, model.encode_text(tokens, cu_seqlens))


@pytest.mark.parametrize("tower_width", [12, 32])
def test_projections_start_by_keeping_similarities(tower_width):
    """32 to 16 is a projection (orthonormal rows), 12 to 16 an isometry."""
    weight = ECLIP(tiny(vision_width=tower_width)).image_projection.weight
    gram = weight @ weight.T if tower_width > 16 else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


def test_decode_joins_queries_and_decoder(model):
    tokens, prompts, modality = torch.randn(2, 16, 16), torch.randn(2, 5, 16), torch.randint(2, (2, 5))
    assert model.decode(tokens, prompts, modality).assignment is None
    output = model.decode(tokens, prompts, modality, return_map=True)
    finished = model.decode_queries(tokens, model.queries(prompts, modality))
    torch.testing.assert_close(output.slots, finished.slots)
    assert (output.slots.shape, output.assignment.shape, output.entropy.shape) == ((2, 5, 16), (2, 5, 16), ())


def test_instance_queries_are_the_prompt_and_fixed_negatives(model):
    prompt = torch.randn(3, 16)
    queries = model.instance_queries(prompt, 1)
    assert queries.shape == (3, 5, 16)
    torch.testing.assert_close(queries, model.instance_queries(prompt, 1))
    torch.testing.assert_close(queries[1:2], model.instance_queries(prompt[1:2], 1))  # whatever the batch
    torch.testing.assert_close(queries[0, 1:], queries[2, 1:])
    assert not torch.allclose(queries[0, 1:], model.instance_queries(prompt, 1, seed=1)[0, 1:])
    everything = model.queries(prompt[:, None].expand(3, 5, 16), torch.ones(3, 5, dtype=torch.long))
    torch.testing.assert_close(queries[:, 0], everything[:, 0])
    negatives = queries[0, 1:] - model.queries.position[1:] - model.queries.modality[1]
    torch.testing.assert_close(negatives.norm(dim=-1), torch.full((4,), 4.0))


def test_scale_starts_at_the_temperature(model):
    assert model.scale().item() == pytest.approx(1 / 0.07)
    assert model.scale().shape == ()
    assert model.logit_scale.shape == (1,)


@pytest.mark.parametrize(("start", "direction", "limit"), [(9.0, -1.0, 100.0), (-3.0, 1.0, 1.0)])
def test_scale_stays_in_its_range_and_comes_back(model, start, direction, limit):
    """Past the limit the gradient still points back: a clamp in the forward pass would have made it 0."""
    with torch.no_grad():
        model.logit_scale.fill_(start)
    model.clamp_logit_scale()
    assert model.scale().item() == pytest.approx(limit)
    optimizer = torch.optim.SGD([model.logit_scale], lr=1e-3)
    for _ in range(2):
        model.logit_scale.grad = None
        (-direction * model.scale()).backward()
        assert model.logit_scale.grad.item() * -direction > 0
        optimizer.step()
        model.clamp_logit_scale()
    assert (model.scale().item() - limit) * direction > 0


def test_the_whole_model_on_reference_kernels_gives_the_same_numbers(model):
    reference = ECLIP(tiny(kernels="reference"))
    reference.load_state_dict(model.state_dict())
    tokens, queries = torch.randn(2, 16, 16), model.instance_queries(torch.randn(2, 16), 0)
    torch.testing.assert_close(
        model.decode_queries(tokens, queries).slots, reference.decode_queries(tokens, queries).slots
    )


def test_every_parameter_gets_a_gradient(model):
    features = model.encode_image(torch.randn(2, 3, 32, 32))
    texts = model.encode_text(torch.arange(32) % 50, torch.tensor([0, 16, 32]))
    prompts = torch.stack([texts, features.cls, texts.flip(0), features.cls.flip(0), texts], dim=1)
    output = model.decode(features.tokens, prompts, torch.tensor([[0, 1, 0, 1, 0]]).expand(2, 5))
    loss = (
        (output.slots * torch.randn(2, 5, 16)).sum() + output.entropy + model.match(texts)[:, 0].sum() * model.scale()
    )
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
