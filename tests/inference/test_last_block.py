"""The last block computes the prefix tokens only while nothing else is read, whenever a model is changed."""

import copy
import types

import pytest
import timm
import torch
from test_fuse import CLOSE, images, multiply_adds, shaken, small
from timm.models import tnt
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn.modules import module as torch_module

import localvit


class Mixing(nn.Module):
    """Mixes tokens, wherever it stands."""

    def forward(self, x, *args, **kwargs):
        return x + x.mean(1, keepdim=True)


def last_stage(model):
    return model.stages[-1] if hasattr(model, "stages") else model


def last_block(model):
    return last_stage(model).blocks[-1]


def replaced(*path):
    """Replace a module of the last block, or with a leading "model" of the model, by one that mixes tokens."""

    def change(model):
        parent = model if path[0] == "model" else last_block(model)
        parent.set_submodule(path[-1], Mixing().eval())

    return change


def patched(*path):
    """Replace the forward of such a module on the instance."""

    def change(model):
        module = model.get_submodule(path[-1]) if path[0] == "model" else last_block(model).get_submodule(path[-1])
        module.forward = types.MethodType(_twice_mixed, module)

    return change


def _twice_mixed(self, x, *args, **kwargs):
    out = type(self).forward(self, x, *args, **kwargs)
    return out + out.mean(1, keepdim=True)


def hooked(*path):
    def change(model):
        module = model.get_submodule(path[-1]) if path[0] == "model" else last_block(model).get_submodule(path[-1])
        module.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))

    return change


def _mean_head(self, x, pre_logits=False):
    return self.head(x[:, 1:].mean(1))


def head_patched(model):
    model.forward_head = types.MethodType(_mean_head, model)


def _last_pool(self, x, pool_type=None):
    return x[:, -1]


def pool_patched(model):
    model.pool = types.MethodType(_last_pool, model)


def _mixed_features(self, x, **kwargs):
    x = type(self).forward_features(self, x, **kwargs)
    return x + x.mean(1, keepdim=True)


def features_patched(model):
    model.forward_features = types.MethodType(_mixed_features, model)


def pooled_by_attention(model):
    model.attn_pool = Mixing().eval()
    model.forward_head = types.MethodType(lambda self, x, pre_logits=False: self.head(self.pool(x)[:, 0]), model)


def averaged(model):
    torch.manual_seed(1)
    model.reset_classifier(7, "avg")
    model.double().eval()


def head_with_layers(model):
    torch.manual_seed(1)
    model.head = nn.Sequential(nn.Linear(model.embed_dim, 5), nn.Tanh(), nn.Linear(5, 7)).double().eval()


def block_repeated(model):
    last_stage(model).blocks.append(copy.deepcopy(last_block(model)))


def same_block_twice(model):
    last_stage(model).blocks.append(last_block(model))


def block_removed(model):
    stage = last_stage(model)
    stage.blocks = stage.blocks[:-1]


def block_replaced(model):
    last_stage(model).blocks[-1] = Mixing().eval()


class Averages(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return self.head(x.mean(1))


def subclassed(model):
    model.__class__ = Averages


def adapter_hooked(model):
    """A localized model: what is hooked is the projection that reads the adapter."""
    last_block(model).mlp.fc2.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))


def scaled_attention(model):
    last_block(model).attn.scale = 0.01
    last_block(model).attn.fused_attn = False


ANY = {
    "head method": head_patched,
    "features method": features_patched,
    "norm": replaced("model", "norm"),
    "norm's forward": patched("model", "norm"),
    "norm's hook": hooked("model", "norm"),
    "block's norm": hooked("norm2"),
    "averaged": averaged,
    "head with layers": head_with_layers,
    "same block twice": same_block_twice,
    "block removed": block_removed,
}
VIT = ANY | {
    "pool": pool_patched,
    "attention pool": pooled_by_attention,
    "activation": replaced("mlp.act"),
    "activation's forward": patched("mlp.act"),
    "dropout of the attention": replaced("attn.proj_drop"),
    "stochastic depth": replaced("drop_path1"),
    "second stochastic depth": hooked("drop_path2"),
    "layer scale": replaced("ls2"),
    "norm of the feed-forward": replaced("mlp.norm"),
    "second norm": replaced("norm2"),
    "attention": replaced("attn"),
    "attention's forward": patched("attn"),
    "feed-forward's forward": patched("mlp"),
    "feed-forward's hook": hooked("mlp"),
    "projection's hook": hooked("mlp.fc2"),
    "list of blocks": hooked("model", "blocks"),
    "block": block_replaced,
    "block repeated": block_repeated,
    "subclass": subclassed,
    "scale": scaled_attention,
}
CASES = [
    *(("vit_tiny_patch16_224", change) for change in VIT),
    *((name, change) for name in ("localvit_tiny", "localvit_pvt_tiny", "localvit_tnt_tiny") for change in ANY),
    *(("tnt_tiny", change) for change in ("head method", "norm's hook", "activation", "block repeated")),
    *(("pvt_tiny", change) for change in ("head method", "norm's hook", "activation", "stochastic depth")),
]


def changed(name, change, model):
    if change == "block's norm" and "tnt" in name:
        hooked("norm_mlp")(model)
    else:
        VIT[change](model)
    return model


@pytest.mark.parametrize(("name", "change"), CASES)
def test_changed_before_and_after(name, change):
    model = small(name)
    with torch.no_grad():
        before = model(images(name))
        fused = localvit.fuse(model)
        torch.testing.assert_close(fused(images(name)), before, **CLOSE)
        fused_later = localvit.fuse(changed(name, change, model))
        expected = model(images(name))
        if name == "vit_tiny_patch16_224":
            assert not torch.allclose(expected, before)  # What changed matters.
        torch.testing.assert_close(fused_later(images(name)), expected, **CLOSE)
        changed(name, change, fused)
        torch.testing.assert_close(fused(images(name)), expected, **CLOSE)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "localvit_pvt_tiny", "localvit_tnt_tiny", "t2t_vit_7"])
def test_hooks_that_look_see_every_token(name):
    fused = localvit.fuse(small(name))
    shapes = []
    for module in (last_block(fused).mlp, fused.norm):
        module.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape[1]))
    with torch.no_grad():
        features = fused.forward_features(images(name))
        shapes.clear()
        fused(images(name))
    assert shapes == [features.shape[1]] * 2


@pytest.mark.parametrize("cls", [Block, nn.LayerNorm, tnt.Block])
def test_classes_patched_after_fusing(cls, monkeypatch):
    name = "tnt_tiny" if cls is tnt.Block else "vit_tiny_patch16_224"
    model = small(name, **({"norm_layer": nn.LayerNorm} if cls is nn.LayerNorm else {}))
    fused = localvit.fuse(model)
    original = cls.forward

    def mixed(self, x, *args, **kwargs):
        out = original(self, x, *args, **kwargs)
        return out if isinstance(out, tuple) else out + out.mean(1, keepdim=True)

    monkeypatch.setattr(cls, "forward", mixed)
    with torch.no_grad():
        torch.testing.assert_close(fused(images(name)), model(images(name)), **CLOSE)


def test_hooks_on_all_modules():
    name = "vit_tiny_patch16_224"
    model, seen = small(name), []
    fused = localvit.fuse(model)
    handle = torch_module.register_module_forward_hook(lambda module, args, out: seen.append(out.shape))
    try:
        with torch.no_grad():
            fused(images(name))
            of_fused = list(seen)
            seen.clear()
            model(images(name))
    finally:
        handle.remove()
    assert of_fused == seen


@pytest.mark.parametrize("change", [adapter_hooked, patched("mlp.fc2"), replaced("mlp.act"), lambda model: None])
def test_localized_model_changed_before_and_after(change):
    name = "vit_tiny_patch16_224"
    model = shaken(localvit.localize(small(name)))
    with torch.no_grad():
        fused = localvit.fuse(model)
        assert multiply_adds(fused, name) < multiply_adds(model, name)
        torch.testing.assert_close(fused(images(name)), model(images(name)), **CLOSE)
        change(model)
        expected = model(images(name))
        torch.testing.assert_close(localvit.fuse(model)(images(name)), expected, **CLOSE)
        change(fused)
        torch.testing.assert_close(fused(images(name)), expected, **CLOSE)


def test_weights_changed_in_place_and_loaded_after_fusing():
    """A fused model without batch norms has the state dict of the model."""
    name = "vit_tiny_patch16_224"
    model, other = small(name), small(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
        fused = localvit.fuse(shaken(localvit.localize(model)))
        assert fused.state_dict().keys() == localvit.localize(model).state_dict().keys()
        plain = localvit.fuse(model)
        plain.load_state_dict(other.state_dict())
        torch.testing.assert_close(plain(images(name)), other(images(name)), **CLOSE)


def test_gradient_checkpointing_of_a_fused_model():
    name = "vit_tiny_patch16_224"
    model = small(name)
    fused = localvit.fuse(model)
    gradients = []
    for each in (model, fused):
        each.set_grad_checkpointing(True)
        x = images(name).requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, **CLOSE)


def test_patched_head_of_timms_own_model():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10).eval()
    head_patched(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(localvit.fuse(model)(x), model(x), rtol=0, atol=0)
