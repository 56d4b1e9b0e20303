"""Every published model against the published program: names, logits, loss, gradients, running statistics."""

import math

import pytest
import timm
import torch
import weights
from torch.nn.functional import cross_entropy

from localvit.models.pretrained import from_published
from localvit.models.published_names import published_key
from published import GOLDEN, golden_model

NAMES = sorted(path.stem for path in (GOLDEN / "models").glob("*.json"))
WIDER = ("localvit_small_mlp4_act3_r384", "localvit_tiny_mlp4_act3_r4", "localvit_tnt_s_patch16_224")
"""Those that differ from another one in their sizes only: their logits are compared, and the other's training step."""


@pytest.fixture(scope="module", params=NAMES)
def fixture(request):
    return golden_model(request.param)


@pytest.fixture(scope="module")
def model(fixture):
    # Swin uses stochastic depth by default; the fixtures were made without it.
    return timm.create_model(fixture["model"], drop_path_rate=0.0).double()


def published_entries(model):
    """Shape and kind of every entry of the model's state dict, under its published name."""
    parameters = dict(model.named_parameters())
    entries = {}
    for key, value in model.state_dict().items():
        kind = "parameter" if key in parameters else "buffer"
        entries[published_key(model, key)] = (list(value.shape), kind)
    return entries | {key: (list(value.shape), "buffer") for key, value in model.published_buffers().items()}


def kind_here(name, key, published_kind):
    """Whether the model trains a published entry. What nothing trains is a buffer: T2T's sinusoids, random features,
    and the second norm of its tokenizer, which is not used with locality."""
    unused = name == "localvit_T2t_conv7" and key.startswith("tokens_to_token.") and ".norm2." in key
    return "buffer" if unused or published_kind == "frozen parameter" else published_kind


def load_stand_in_weights(model, fixture):
    state_dict = {key: torch.from_numpy(weights.tensor(key, tuple(shape))) for key, shape, _ in fixture["state_dict"]}
    if "tokens_to_token.project.weight" in state_dict:
        # The published T2T keeps its positions in single precision, whatever the dtype of the model.
        state_dict["pos_embed"] = state_dict["pos_embed"].float().double()
    model.load_state_dict(from_published(state_dict, model), strict=True)


def images(spec):
    return torch.from_numpy(weights.images(**spec))


def test_state_dict_has_the_published_entries(model, fixture):
    entries = published_entries(model)
    assert entries == {
        key: (shape, kind_here(fixture["model"], key, kind)) for key, shape, kind in fixture["state_dict"]
    }
    assert len(model.state_dict()) + len(model.published_buffers()) == len(fixture["state_dict"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    published = [key for key, _, kind in fixture["state_dict"] if kind != "buffer"]
    assert sum(math.prod(entries[key][0]) for key in published) == fixture["parameters"]


def test_logits_are_the_published_ones(model, fixture):
    load_stand_in_weights(model, fixture)
    expected = fixture["eval"]
    with torch.inference_mode():
        logits = model.eval()(images(expected["images"]))
    # float64 over at most 12 blocks: rounding stays orders below 1e-9 of the logits' norm.
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    double = {"dtype": torch.float64}
    torch.testing.assert_close(logits[:, :10], torch.tensor(expected["logits_first_10"], **double), **tolerance)
    torch.testing.assert_close(logits.sum(1), torch.tensor(expected["logits_sum"], **double), **tolerance)
    torch.testing.assert_close(logits.norm(dim=1), torch.tensor(expected["logits_norm"], **double), **tolerance)
    assert logits.argmax(1).tolist() == expected["argmax"]


@pytest.mark.parametrize("fixture", [name for name in NAMES if name not in WIDER], indirect=True)
def test_a_training_step_has_the_published_loss_gradients_and_statistics(model, fixture):
    load_stand_in_weights(model, fixture)
    expected = fixture["train"]
    model.train()
    model.zero_grad()
    loss = cross_entropy(model(images(expected["images"])), torch.tensor(expected["targets"]))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)

    norms = {published_key(model, key): p.grad for key, p in model.named_parameters() if p.grad is not None}
    norms = {key: gradient.norm().item() for key, gradient in norms.items()}
    assert norms.keys() == fixture["train_gradient_norms"].keys()
    # torch's hard sigmoid multiplies gradients by a single-precision 1/6, which is 3e-8 off, even in float64. No
    # gradient needs more tolerance than that, not even the 1e-9 of T2T's attention projection: it is a product with
    # inputs of that size, without cancellation. Only unused parameters have norm zero. Since there is no absolute
    # tolerance, ours must be zero too.
    assert norms == pytest.approx(fixture["train_gradient_norms"], rel=1e-7, abs=0)

    statistics = fixture["train_running_statistics_norms_after"]
    buffers = {published_key(model, key): value for key, value in model.named_buffers()}
    norms = {key: value.norm().item() for key, value in buffers.items() if key.endswith(("_mean", "_var"))}
    assert norms == pytest.approx(statistics, rel=1e-9)
