"""Class activation maps equal the grad-cam package's, rollout the product of matrices, and both say what matters."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from small import ONE_OF_EACH, image_size, small_model

import localvit
from localvit.explanations import attention_maps, grad_cam, layers_of, rollout
from localvit.explanations.cam import map_layer
from published import SHARED

CIFAR = SHARED / "data" / "cifar10.zip"
NANO = "localvit_nano_patch4_32"


def model_and_images(name: str, **kwargs):
    torch.manual_seed(0)
    model = small_model(name, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model, torch.randn(3, 3, image_size(name), image_size(name))


TARGET_LAYERS = {  # as users of grad-cam name them
    "localvit_swin_tiny_patch4_window7_224": lambda model: model.norm,
    "localvit_pvt_tiny": lambda model: model.stages[-1].blocks[-1].norm1,
    "localvit_tnt_t_patch16_224": lambda model: model.blocks[-1].norm_out,
    "localvit_T2t_conv7": lambda model: model.blocks[-1].norm1,
    "localvit_nano_patch4_32": lambda model: model.blocks[-1].norm1,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", [None, 4])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_map_equals_the_grad_cam_packages(name, target, fused):
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = model_and_images(name)
    side = images.shape[-1]

    def to_map(tokens):
        if tokens.ndim == 4:
            return tokens.permute(0, 3, 1, 2)
        height = int((tokens.shape[1] - 1) ** 0.5)
        return tokens[:, 1:].unflatten(1, (height, height)).permute(0, 3, 1, 2)

    targets = None if target is None else [ClassifierOutputTarget(target)] * len(images)
    with pytorch_grad_cam.GradCAM(model, [TARGET_LAYERS[name](model)], reshape_transform=to_map) as package:
        expected = package(input_tensor=images.clone(), targets=targets)
    found = grad_cam(localvit.fuse(model) if fused else model, images, target)
    assert found.map_BHW.any()
    ours = scale_cam_image(scale_cam_image(found.map_BHW.numpy(), (side, side)))  # as the package does, once a layer
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    if target is None:
        assert torch.equal(found.target_B, found.logits_BM.argmax(1))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_map_is_taken_where_patches_have_an_effect(name):
    """Where the head reads the class token, the last block's patch tokens have no gradient; at our layer they have."""
    model, images = model_and_images(name)
    layers = layers_of(model)
    kept = []
    last = layers.blocks[-1]
    last.module.register_forward_hook(lambda _m, _a, output: kept.append(output))
    images.requires_grad_()
    model(images)[:, 0].sum().backward(inputs=[images], retain_graph=True)
    output = kept[0][last.item] if last.item is not None else kept[0]
    score = model(images)[:, 0].sum()
    output = kept[1][last.item] if last.item is not None else kept[1]
    (gradient,) = torch.autograd.grad(score, output)
    patches = last.to_map(gradient, tuple(images.shape[-2:]))
    assert bool(patches.any()) != layers.reads_class_token
    read = f"input of {layers.outer_attentions[-1].name}"
    assert map_layer(layers).name == (read if layers.reads_class_token else "norm")


def test_an_averaging_head_gives_the_original_class_activation_map():
    """CAM (arXiv 1512.04150): the last map, weighted by the class's row of the head; here divided by the positions."""
    model, images = model_and_images("localvit_swin_tiny_patch4_window7_224")
    features = []
    model.norm.register_forward_hook(lambda _m, _a, output: features.append(output.detach()))
    found = grad_cam(model, images, 5)
    weight = model.head.fc.weight[5].detach()
    expected = (features[0] * weight).sum(-1).relu() / features[0][0, ..., 0].numel()
    torch.testing.assert_close(found.map_BHW, expected, atol=1e-6, rtol=1e-5)


def test_frozen_weights_keep_no_gradient_and_inference_mode_does_not_matter():
    model, images = model_and_images(NANO)
    expected = grad_cam(model, images).map_BHW
    model.requires_grad_(False)
    with torch.inference_mode():
        found = grad_cam(model, images).map_BHW
    assert torch.equal(found, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("target", "message"), [(7, "class 7 does not exist: .* 0 to 6"), ([1, 2], "2 target classes")]
)
def test_a_class_that_does_not_exist(target, message):
    model, images = model_and_images(NANO)
    with pytest.raises(ValueError, match=message):
        grad_cam(model, images, target)


@pytest.mark.parametrize("name", [NANO, "localvit_T2t_conv7", "localvit_tnt_t_patch16_224"])
def test_rollout_is_the_product_of_the_attentions_with_shortcuts(name):
    model, images = model_and_images(name)
    product = None
    for each in attention_maps(model, images):
        if each.is_inner:
            continue
        mean = each.on_grid().mean(1).double()
        layer = (mean + torch.eye(mean.shape[1])) / 2
        product = layer if product is None else layer @ product
    expected = product[:, 0, 1:]
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(rollout(model, images).double().flatten(1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["localvit_swin_tiny_patch4_window7_224", "localvit_pvt_tiny"])
def test_rollout_of_a_pyramid_is_the_product_with_merging(name):
    """Dense matrices: attention with keys and stages spread evenly over what they stand for, by nearest upsampling."""
    model, images = model_and_images(name)
    maps = attention_maps(model, images)

    def evenly(coarse, fine):  # (tokens of coarse, tokens of fine), without prefix tokens; rows sum to 1
        owner = torch.arange(coarse[0] * coarse[1], dtype=torch.float64).view(1, 1, *coarse)
        owner = torch.nn.functional.interpolate(owner, size=fine, mode="nearest").flatten().long()
        one_hot = torch.nn.functional.one_hot(owner, coarse[0] * coarse[1]).double().T
        return one_hot / one_hot.sum(1, keepdim=True)

    def with_prefix(matrix, old, new):
        whole = torch.zeros(len(matrix) + old, matrix.shape[1] + new, dtype=torch.float64)
        whole[old:, new:] = matrix
        for index in range(min(old, new)):
            whole[index, index] = 1
        return whole

    product, before = None, None
    for each in maps:
        query, key = each.placement.query, each.placement.key
        mean = each.on_grid().mean(1).double()
        if key != query:
            mean = mean @ evenly(key.size, query.size)
        layer = (mean + torch.eye(mean.shape[1])) / 2
        if before is not None and before != query:
            step = with_prefix(evenly(query.size, before.size), query.num_prefix_tokens, before.num_prefix_tokens)
            product = step @ product
        product = layer if product is None else layer @ product
        before = query
    expected = product[:, 0] if layers_of(model).reads_class_token else product.mean(1)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(rollout(model, images).double().flatten(1), expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def photographs():
    """100 test images of CIFAR-10, ten of each class, prepared for the nano that ships."""
    if not CIFAR.exists():
        pytest.skip("CIFAR-10 is not there")
    ready = localvit.load_model(NANO)
    transform = ready.preprocessing.transform()
    with zipfile.ZipFile(CIFAR) as archive:
        names = [name for name in archive.namelist() if "/val/" in f"/{name}" and not name.endswith("/")]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in sorted(names)[::100]]
    return localvit.fuse(ready.model), torch.stack([transform(image) for image in images])


@torch.no_grad()
def drop_of_probability(model, images, scores_BHW, hidden: int = 16):
    """By how much the predicted class's probability falls when the patches of highest score get the mean color."""
    order = scores_BHW.flatten(1).argsort(1, descending=True)[:, :hidden]
    kept = torch.ones(scores_BHW.shape).flatten(1).scatter(1, order, 0).view(len(images), 1, 8, 8)
    before = model(images).softmax(1)
    after = model(images * kept.repeat_interleave(4, 2).repeat_interleave(4, 3)).softmax(1)
    return (before - after).gather(1, before.argmax(1, keepdim=True))[:, 0]


def paired_t(difference) -> float:
    return float(difference.mean() / difference.std() * len(difference) ** 0.5)


def random_drop(model, images):
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(len(images), 8, 8, generator=generator) for _ in range(4)]
    return torch.stack([drop_of_probability(model, images, draw) for draw in draws]).mean(0)


def test_hiding_what_a_class_activation_map_shows_hurts_more_than_hiding_random_patches(photographs):
    """A quarter of the patches, paired over 100 images. 3.39 is the limit of a one-sided p of 0.0005 with 99 degrees
    of freedom; it was 4.9."""
    model, images = photographs
    cam = drop_of_probability(model, images, grad_cam(model, images).map_BHW)
    assert paired_t(cam - random_drop(model, images)) > 3.39


def test_hiding_what_rollout_shows_hurts_more_than_hiding_what_it_leaves_dark(photographs):
    """Rollout knows no class, and its advantage over random patches depends on how long a model was trained
    (docs/explain.md). Its highest patches matter more than its lowest: t was 3.8. 2.36 is a one-sided p of 0.01."""
    model, images = photographs
    shares = rollout(model, images)
    difference = drop_of_probability(model, images, shares) - drop_of_probability(model, images, -shares)
    assert paired_t(difference) > 2.36
