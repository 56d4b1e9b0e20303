"""The inference form: the same numbers, for every family and ablation, whatever the statistics."""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import localvit
from localvit.locality import ACTS, LocalityFeedForward
from localvit.surgery.localize import locality_modules
from localvit.tokens import FusedMlp

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
"""float64: a fold rounds each weight once more, and sums of hundreds of terms run in another order."""

NANO = {"img_size": (20, 28), "num_classes": 7, "depth": 3}
SMALL = {
    "localvit_nano_patch4_32": NANO,
    "localvit_tiny": NANO | {"img_size": (32, 48), "embed_dim": 24, "num_heads": 3, "reduction": 8},
    "localvit_swin_tiny": {"img_size": (64, 96), "num_classes": 7, "embed_dim": 24, "depths": (1, 1, 2, 1)},
    "localvit_pvt_tiny": {"img_size": (64, 96), "num_classes": 7},
    "localvit_tnt_tiny": {"img_size": (32, 48), "num_classes": 7, "depth": 2},
    "localvit_t2t_7": {"img_size": (32, 48), "num_classes": 7, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": (32, 48), "num_classes": 7, "depth": 3},
    "vit_tiny_patch16_224": {"img_size": (32, 48), "num_classes": 7, "depth": 2, "qk_norm": True, "init_values": 0.5},
    "vit_small_patch14_reg4_dinov2": {"img_size": (42, 28), "num_classes": 7, "depth": 2},
}


def shaken(model):
    """The model in evaluation mode with all weights and statistics off their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, entry in (*model.named_parameters(), *model.named_buffers()):
            if entry.is_floating_point():
                noise = torch.randn(entry.shape, generator=generator, dtype=torch.float64)
                entry.mul_(1.5 + noise.clamp(-1, 1)) if "running_var" in name else entry.add_(0.1 * noise)
    return model.eval()


def small(name, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return shaken(localvit.create_model(name, **SMALL[name] | changes).to(dtype))


def pictures(name, batch=2, dtype=torch.float64):
    size = SMALL[name]["img_size"]
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", [{}, {"dp_first": True}, {"wo_dp_conv": True}, {"stride": 2}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_module(act, form, memory_format):
    torch.manual_seed(0)
    module = shaken(LocalityFeedForward(6, 6, act=act, reduction=2, expand_ratio=3, **form).double())
    map_BCHW = torch.randn(3, 6, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    untouched = map_BCHW.clone()
    fused = module.fuse()
    torch.testing.assert_close(fused(map_BCHW), module(map_BCHW), **CLOSE)
    assert torch.equal(map_BCHW, untouched)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    module.conv[1].running_mean += 1.0  # the negative control: another module is another function
    assert not torch.allclose(fused(map_BCHW), module(map_BCHW))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_model(name, dtype, tolerance):
    model = small(name, dtype)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected, features = model(pictures(name, dtype=dtype)), model.forward_features(pictures(name, dtype=dtype))
        fused = localvit.fuse(model)
        for batch in (2, 1):
            out = fused(pictures(name, dtype=dtype)[:batch])
            assert (out - expected[:batch]).abs().max() <= tolerance * expected.abs().max()
        again = fused.forward_features(pictures(name, dtype=dtype))
    assert again.shape == features.shape
    assert (again - features).abs().max() <= tolerance * features.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["localvit_tiny", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("options", [{"gate": "se"}, {"preserve": False, "act": "hs+eca"}])
def test_localized_model(name, options):
    model = shaken(localvit.localize(small(name, **({"local_blocks": []} if "localvit" in name else {})), **options))
    with torch.no_grad():
        expected = model(pictures(name))
        fused = localvit.fuse(model)
        torch.testing.assert_close(fused(pictures(name)), expected, **CLOSE)
        assert torch.equal(fused.forward_features(pictures(name)).isfinite().all(), torch.tensor(True))


def test_branches_on_what_timm_folds_are_kept():
    torch.manual_seed(0)
    levit = timm.create_model("levit_128s", img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1))
    model = shaken(localvit.localize(levit.double()))
    picture = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = localvit.fuse(model)
    assert len(locality_modules(fused)) == len(locality_modules(model)) > 0
    with torch.no_grad():
        # timm folds its batch norms into float32 weights.
        torch.testing.assert_close(fused(picture), model(picture), rtol=1e-5, atol=1e-5)


def test_the_last_blocks_dead_work_is_gone():
    """By as many multiply-adds as the patches' queries, output projections and feed-forward in one block have."""
    model = small("localvit_tiny")
    fused = localvit.fuse(model)
    counts = []
    for each in (model, fused):
        each.requires_grad_(False)
        with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            each(pictures("localvit_tiny", batch=1))
        counts.append(counter.get_total_flops() // 2)
    dim, hidden, patches, bottleneck = 24, 96, 2 * 3, 96 // 8
    feed_forward = patches * (2 * dim * hidden + 9 * hidden) + 2 * hidden * bottleneck
    attention = patches * 2 * dim * dim + 2 * patches * (patches + 1) * dim
    assert counts[0] - counts[1] == feed_forward + attention


def test_every_token_of_features_is_still_there_between_logits():
    model = small("localvit_tiny")
    fused = localvit.fuse(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(pictures("localvit_tiny")), model(pictures("localvit_tiny")), **CLOSE)
            with pytest.raises(AssertionError, match="should be divisible by patch size"):  # timm's
                fused(torch.zeros(1, 3, 31, 48, dtype=torch.float64))
            after = fused.forward_intermediates(pictures("localvit_tiny"))[1]
            for mine, theirs in zip(after, model.forward_intermediates(pictures("localvit_tiny"))[1], strict=True):
                torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["localvit_tiny", "localvit_swin_tiny"])
def test_copied_compiled_and_exported(name):
    torch._dynamo.reset()
    fused = localvit.fuse(small(name))
    with torch.no_grad():
        expected = fused(pictures(name))
        torch.testing.assert_close(copy.deepcopy(fused)(pictures(name)), expected, rtol=0, atol=0)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(pictures(name)), expected, **CLOSE)
        program = torch.export.export(fused, (pictures(name),), strict=False)
        # The unfused model's program is as far from it: 5e-10.
        torch.testing.assert_close(program.module()(pictures(name)), expected, rtol=1e-7, atol=1e-9)


def test_timms_own_call_finds_the_modules():
    model = small("localvit_nano_patch4_32")
    folded = reparameterize_model(model)
    assert sum(isinstance(module, FusedMlp) for module in folded.modules()) == 3
    with torch.no_grad():
        name = "localvit_nano_patch4_32"
        torch.testing.assert_close(folded(pictures(name)), model(pictures(name)), **CLOSE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_lower_precision(dtype, tolerance):
    # 2^-9 and 2^-11 over some ten roundings in each of three blocks.
    name = "localvit_tiny"
    model = small(name)
    with torch.no_grad():
        expected = model(pictures(name))
        out = localvit.fuse(copy.deepcopy(model).to(dtype))(pictures(name, dtype=dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def test_training_mode_is_refused():
    model = small("localvit_nano_patch4_32")
    with pytest.raises(ValueError, match=r"LocalViT is in training mode.*call model.eval\(\) before fuse"):
        localvit.fuse(model.train())
    with pytest.raises(ValueError, match=r"call eval\(\) before fuse\(\)"):
        model.blocks[0].mlp.fuse()
