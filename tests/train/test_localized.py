"""Training models with added locality: from the weights of a plain model, with both methods, and after a resume."""

import pytest
import torch
from tiny import tiny_config, write_some_digits

import localvit
from localvit.surgery.localize import locality_modules
from localvit.train.builder import build
from localvit.train.loop import fit
from localvit.train.model import build_model

HOST = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "input_size": (16,),
}
ARGUMENTS = HOST["model_args"] | {"img_size": (16, 16)}
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of a plain model of three digits."""
    torch.manual_seed(7)
    model = localvit.create_model(HOST["model"], num_classes=3, **ARGUMENTS)
    return localvit.save_checkpoint(
        model, tmp_path_factory.mktemp("base") / "base.safetensors", class_names=["0", "1", "2"]
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_some_digits(tmp_path_factory.mktemp("digits"), classes=3, train=13, val=3)


def built(base, tmp_path, classes=("0", "1", "2"), **changes):
    config = tiny_config(tmp_path, tmp_path, finetune=str(base), **HOST | changes)
    model, _ = build_model(config, len(classes), list(classes))
    return model.eval()


def test_fine_tuning_starts_with_the_function_of_the_base(base, tmp_path, caplog):
    plain, _ = localvit.model_from_checkpoint(base)
    model = built(base, tmp_path, localize={"gate": "eca"})
    assert len(locality_modules(model)) == 2
    assert torch.equal(model(IMAGES), plain.eval()(IMAGES))
    assert any("added to 2 feed-forward layers" in line for line in caplog.messages)
    assert not any("different arguments" in line for line in caplog.messages)


def test_replacing_keeps_all_weights_but_those_of_the_feed_forwards(base, tmp_path):
    plain, _ = localvit.model_from_checkpoint(base)
    model = built(base, tmp_path, localize={"method": "replace", "reduction": 8})
    before, after = plain.state_dict(), model.state_dict()
    gone = {name for name in before if ".mlp." in name or ".norm2." in name}
    assert before.keys() - after.keys() == gone
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - gone)


def test_a_head_for_other_classes_is_trained_with_frozen_features(base, tmp_path):
    model = built(base, tmp_path, classes=("0", "1", "7", "8"), localize={"trainable": "locality"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "head.weight",
        "head.bias",
        *(name for name, _ in model.named_parameters() if ".locality." in name),
    }
    kept = built(base, tmp_path, localize={"trainable": "locality"})
    assert not kept.head.weight.requires_grad


def test_a_localized_checkpoint_keeps_its_locality(base, tmp_path, caplog):
    model = built(base, tmp_path, localize={"kernel_size": 5})
    with torch.no_grad():
        for module in locality_modules(model).values():
            module.conv.weight.normal_(generator=torch.Generator().manual_seed(2))
    path = localvit.save_checkpoint(model, tmp_path / "localized.safetensors", class_names=["0", "1", "2"])
    caplog.clear()
    again = built(path, tmp_path, localize={"kernel_size": 5})
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert not any("added to" in line for line in caplog.messages)
    with pytest.raises(ValueError, match="does not fit the model"):
        built(path, tmp_path)


def test_training_only_locality_needs_pretrained_weights(tmp_path):
    with pytest.raises(ValueError, match=r"trainable=locality freezes all other weights.*finetune must name"):
        tiny_config(tmp_path, tmp_path, **HOST, localize={"trainable": "locality"})


def test_a_resumed_run_gives_the_same_model(base, digits, tmp_path):
    settings = {"finetune": str(base), "localize": {"gate": "se"}, "ema_decay": None, "epochs": 2, **HOST}
    fit(build(tiny_config(digits, tmp_path / "whole", **settings)))
    after_one = tmp_path / "whole" / "checkpoint.1.pth"
    assert torch.load(after_one, weights_only=False)["epoch"] == 0
    fit(build(tiny_config(digits, tmp_path / "resumed", **settings), resume=str(after_one)))
    ends = []
    for folder in ("whole", "resumed"):
        rebuilt, _ = localvit.model_from_checkpoint(tmp_path / folder / "last.safetensors")
        ends.append(rebuilt.eval()(IMAGES))
    assert torch.equal(*ends)
    assert [module.is_neutral for module in locality_modules(rebuilt).values()] == [False, True]
