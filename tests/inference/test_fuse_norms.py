"""Fusing with other batch norms than the module's, and with blocks of timm that fold their own."""

import types

import pytest
import timm
import torch
from test_fuse import CLOSE, shaken
from timm.layers import BatchNormAct2d
from timm.utils import freeze
from torch import nn

import localvit
from localvit.ops import FusedConvolutions
from localvit.train.sync_batch_norm import synchronize_batch_norms


def nano():
    torch.manual_seed(0)
    return shaken(localvit.create_model("localvit_nano_patch4_32", depth=2, embed_dim=24, img_size=16).double())


def levit():
    torch.manual_seed(0)
    host = timm.create_model("levit_128s", img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1))
    return shaken(localvit.localize(host.double()))


def each_norm_replaced(make):
    def change(model):
        for name, norm in list(model.named_modules()):
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
                model.set_submodule(name, make(type(norm), norm.num_features).double().eval())

    return change


def with_activation(model):
    model.blocks[0].mlp.conv[1] = shaken(BatchNormAct2d(96, act_layer=nn.SiLU).double())


def without_buffers(model):
    norm = model.blocks[0].mlp.conv[4]
    norm.running_mean = norm.running_var = None


CHANGES = {
    "one block frozen": lambda model: freeze(model, ["blocks.0"]),
    "frozen": freeze,
    "synchronized": nn.SyncBatchNorm.convert_sync_batchnorm,
    "synchronized on CPUs": lambda model: synchronize_batch_norms(model, torch.device("cpu")),
    "no weights": each_norm_replaced(lambda kind, channels: kind(channels, affine=False)),
    "no statistics": each_norm_replaced(lambda kind, channels: kind(channels, track_running_stats=False)),
    "no buffers": without_buffers,
    "activation": with_activation,
}


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_other_batch_norms(name, evaluated):
    model = nano()
    CHANGES[name](model)
    if evaluated:
        model.eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(localvit.fuse(model)(x), model(x), **CLOSE)


def hooked(model):
    for module in model.modules():
        if hasattr(module, "fuse"):
            module.register_forward_hook(lambda module, args, out: 0.5 * out)


def patched(model):
    for module in model.modules():
        if hasattr(module, "fuse"):
            module.forward = types.MethodType(_halved, module)


def _halved(self, x):
    return 0.5 * type(self).forward(self, x)


class Halved(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


def layer_of_another_library(model):
    for name, module in list(model.named_modules()):
        if name.endswith("head.linear") or name.endswith("qkv.linear"):
            replacement = Halved(module.in_features, module.out_features, module.bias is not None).double()
            replacement.load_state_dict(module.state_dict())
            model.set_submodule(name, replacement.eval())


@pytest.mark.parametrize(
    "change",
    [
        *(freeze, CHANGES["synchronized"], CHANGES["no weights"], CHANGES["no statistics"]),
        *(hooked, patched, layer_of_another_library),
    ],
)
def test_blocks_of_timm_that_fold_their_own(change):
    model = levit()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        change(model)
        expected = model(x)
        assert change in (freeze, CHANGES["synchronized"]) or not torch.allclose(expected, before)
        # timm folds its batch norms into float32 weights.
        torch.testing.assert_close(localvit.fuse(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_in_training_mode_is_refused():
    model = nano()
    model.blocks[0].mlp.conv[1].train()
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval\(\) before fuse"):
        localvit.fuse(model)


def test_the_modules_norms_are_folded():
    """The control of the tests above."""
    assert sum(isinstance(module, FusedConvolutions) for module in localvit.fuse(nano()).modules()) == 2
