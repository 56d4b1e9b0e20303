"""What locality changes: kernels without neighbors, distances and receptive fields, against closed forms."""

import base64
import copy
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import LOCAL, ONE_OF_EACH, image_size, small_model
from torch import nn

import localvit
from localvit.data.folders import scan_folder
from localvit.explanations import (
    attention_distance,
    attention_maps,
    layers_of,
    local_layers,
    measure_locality,
    receptive_fields,
    without_neighbors,
)
from localvit.explanations.attention import AttentionMap
from localvit.explanations.distance import center_of, field_distance, share_nearby, uniform_distance
from localvit.explanations.layers import Placement, TokenGrid

NANO = "localvit_nano_patch4_32"


def shaken(name: str, **kwargs):
    torch.manual_seed(0)
    model = small_model(name, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model, torch.randn(2, 3, image_size(name), image_size(name))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_kernels_keep_their_center_only_and_the_model_stays(name):
    model, images = shaken(name)
    before = copy.deepcopy(model.state_dict())
    changed = without_neighbors(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    convolutions = {key: part for key, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    depthwise = [key for key, part in convolutions.items() if part.groups == part.in_channels > 1]
    assert len(depthwise) == len(local_layers(model)) > 0
    center = torch.zeros(3, 3)
    center[1, 1] = 1
    for key, value in changed.state_dict().items():
        expected = before[key] * center if key.removesuffix(".weight") in depthwise else before[key]
        assert torch.equal(value, expected)
    with torch.no_grad():
        assert not torch.allclose(changed(images), model(images))
        fused = without_neighbors(localvit.fuse(model))
        torch.testing.assert_close(fused(images), changed(images), atol=2e-4, rtol=1e-3)


def test_only_the_named_layers_change():
    model, _ = shaken(NANO)
    first, second = local_layers(model)
    changed = without_neighbors(model, [second]).state_dict()
    different = {key for key, value in model.state_dict().items() if not torch.equal(value, changed[key])}
    assert different == {f"{second}.conv.3.weight"}
    with pytest.raises(ValueError, match=r"'blocks\.7' is not a locality module of the model; these are blocks\.0"):
        without_neighbors(model, ["blocks.7"])
    assert first == "blocks.0.mlp"


def test_adapters_of_localized_models_and_models_without_locality():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    with pytest.raises(ValueError, match="VisionTransformer has no locality module with a depth-wise convolution"):
        without_neighbors(model)
    local = localvit.localize(model, localvit.Adapter(kernel_size=5))
    assert len(local_layers(local)) == 2
    for part in local.modules():
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            nn.init.ones_(part.weight)
    changed = without_neighbors(local)
    kernels = [part.weight for part in changed.modules() if isinstance(part, nn.Conv2d) and part.groups > 1]
    assert [kernel.sum().item() for kernel in kernels] == [768.0, 768.0]
    assert [kernel[:, 0, 2, 2].sum().item() for kernel in kernels] == [768.0, 768.0]


def test_the_last_block_changes_nothing_where_the_head_reads_the_class_token():
    model, images = shaken(NANO)
    last = local_layers(model)[-1]
    with torch.no_grad():
        assert torch.equal(without_neighbors(model, [last])(images), model(images))


def full_map(weights, size, prefix):
    grid = TokenGrid(size=size, num_prefix_tokens=prefix)
    return AttentionMap(layer="x", weights_BWMQK=weights[:, None], placement=Placement.full(grid))


def test_attention_distance_of_known_patterns():
    """On a grid of 2 x 3 patches of 5 x 7 pixels: attention to itself, to the right neighbor, to all, to class."""
    height, width, size = 2, 3, (10, 21)
    tokens = 1 + height * width
    weights = torch.zeros(1, 3, tokens, tokens)
    for query in range(tokens):
        weights[0, 0, query, query] = 1
        right = query + 1 if query % width else query - width + 1  # the first one of the row for the last one
        weights[0, 1, query, right if query else 0] = 0.25
        weights[0, 1, query, 0] += 0.75  # the class token, which does not count
    weights[0, 2] = 1 / tokens
    found = attention_distance(full_map(weights, (height, width), 1), size)[0]
    centers = [(5 * (row + 0.5), 7 * (column + 0.5)) for row in range(height) for column in range(width)]
    mean = np.mean([np.hypot(a[0] - b[0], a[1] - b[1]) for a in centers for b in centers])
    np.testing.assert_allclose(found, [0, (7 + 7 + 14) / 3, mean], rtol=1e-6)
    assert uniform_distance(full_map(weights, (height, width), 1), size) == pytest.approx(mean)


@pytest.mark.parametrize("name", ["localvit_swin_tiny_patch4_window7_224", "localvit_pvt_tiny"])
def test_attention_distance_in_windows_and_with_reduced_keys(name):
    """Pair by pair on the dense map of the grid."""
    model, images = shaken(name)
    size = tuple(images.shape[-2:])
    for each in attention_maps(model, images)[:3]:
        query, key = each.placement.query, each.placement.key
        dense = each.on_grid().double()
        sides = [[(torch.arange(side) + 0.5) * size[0] / side for side in grid.size] for grid in (query, key)]
        places = [torch.cartesian_prod(*each) for each in sides]
        distance = torch.cdist(places[0].double(), places[1].double())
        expected = (dense * distance).sum(-1).mean(-1)
        torch.testing.assert_close(attention_distance(each, size).double(), expected, atol=1e-4, rtol=0)
        assert uniform_distance(each, size) <= distance.max()


def test_a_receptive_field_is_the_sum_of_squares_of_the_jacobian():
    """The mean over many random signs against torch's Jacobian."""
    model, images = shaken(NANO, img_size=8, embed_dim=24, num_heads=2)
    images = images[:1, :, :8, :8].clone()
    tokens = []
    model.blocks[0].register_forward_hook(lambda _m, _a, output: tokens.append(output))

    def center(x):
        model(x)
        return tokens[-1][0, 1 + 1 * 2 + 1]  # row 1, column 1 of 2 x 2, after the class token

    jacobian = torch.autograd.functional.jacobian(center, images)
    expected = jacobian.square().sum((0, 1, 2))
    found = torch.stack([receptive_fields(model, images, seed=seed)["blocks.0"] for seed in range(150)]).mean(0)
    assert (found / expected - 1).abs().mean() < 0.1  # 150 signs leave an error of about 1 / sqrt(150) = 0.08


def test_without_neighbors_the_convolution_reads_one_patch():
    """With attention switched off by zero projections, only the convolutions mix: 1 patch more in each block."""
    model, _ = shaken(NANO, img_size=28, depth=3, act="hs")  # a gate would read the whole map
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    images = torch.randn(2, 3, 28, 28)
    for changed, reach in ((model, (1, 2, 3)), (without_neighbors(model), (0, 0, 0))):
        for field, patches in zip(receptive_fields(changed, images).values(), reach, strict=True):
            outside = field.clone()
            low, high = max(0, 4 * (3 - patches)), 4 * (4 + patches)
            outside[low:high, low:high] = 0
            assert outside.abs().max() < 1e-12 * field.max() or not outside.any()
            assert share_nearby(field, (7, 7), patches) == pytest.approx(1)
            if patches:
                assert share_nearby(field, (7, 7), patches - 1) < 0.9999


def test_distance_and_share_of_known_fields():
    field = torch.zeros(12, 12)
    field[6, 9] = 4.0  # its center is at (6.5, 9.5)
    assert center_of((6, 6), (12, 12)) == (7.0, 7.0)
    assert field_distance(field, (7.0, 7.0)) == pytest.approx(np.hypot(0.5, 2.5))
    field[7, 7] = 1.0  # half the size of the gradient
    expected = (2 * np.hypot(0.5, 2.5) + 1 * np.hypot(0.5, 0.5)) / 3
    assert field_distance(field, (7.0, 7.0)) == pytest.approx(expected)
    assert share_nearby(field, (6, 6), 0) == pytest.approx(0.2)
    assert share_nearby(field, (6, 6), 1) == pytest.approx(1.0)


@pytest.fixture
def folder(tmp_path):
    """Six images of two of CIFAR-10's classes, and a file that is not an image."""
    rng = np.random.default_rng(0)
    for name in ("cat", "ship"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "broken.png").write_bytes(b"no image")
    return tmp_path


def test_measures_count_what_evaluation_counts(folder):
    images, _ = scan_folder(folder)
    options = localvit.InferenceOptions(workers=0, batch_size=4, device=torch.device("cpu"), fuse=False)
    found = measure_locality(NANO, images, options)
    assert (found.num_images, found.num_probes, found.image_size) == (6, 6, (32, 32))
    ready = localvit.load_model(NANO)
    single = [(name,) for name in local_layers(ready.model)]
    assert [each.without for each in found.accuracies] == [(), *single, found.local_layers]
    for each in found.accuracies:
        model = without_neighbors(ready.model, each.without) if each.without else ready.model
        loaded = replace(ready, model=model)
        result = localvit.evaluate(loaded, images, options=options, skip_unreadable=True)
        assert each.correct == round(result.acc1 / 100 * 6)
        assert each.change == pytest.approx((each.correct - found.accuracies[0].correct) / 6)
    assert len(found.reaches) == len(found.fields) == len(found.fields_without) == 6
    assert all(0 < value < 32 for reach in found.reaches for value in reach.pixels)


def test_a_model_without_locality_is_measured_as_it_is():
    images = torch.randn(3, 3, 32, 32)
    model = small_model(NANO, local_blocks=()).eval()
    assert local_layers(model) == ()
    fields = receptive_fields(model, images)
    assert list(fields) == [block.name for block in layers_of(model).blocks]


def test_the_files_of_measures(folder, tmp_path):
    pytest.importorskip("matplotlib")
    from localvit.explanations.measures_files import write_measures

    images, _ = scan_folder(folder)
    options = localvit.InferenceOptions(workers=0, device=torch.device("cpu"), fuse=False)
    names = localvit.load_model(NANO).class_names
    models = [small_model(NANO, img_size=32, num_classes=10, local_blocks=blocks).eval() for blocks in (None, ())]
    for model in models:
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
    local, plain = models
    measured = [
        measure_locality(local, images, options, name="a $b_c", limit=4),
        measure_locality(plain, images, options),
    ]
    figure, numbers, page = write_measures(measured, tmp_path / "out")
    with Image.open(figure) as image:
        assert image.width > 800
    first, second = json.loads(numbers.read_text())
    assert (first["model"], second["model"]) == ("a $b_c", "LocalViT")
    assert len(first["accuracy"]) == 4  # none, each of two blocks, all
    assert second["accuracy"][0]["acc1"] == pytest.approx(100 * second["accuracy"][0]["correct"] / 6, abs=1e-3)
    check_page(page.read_text(), [first, second], figure.read_bytes())
    write_measures([measured[0], copy.deepcopy(measured[0])], tmp_path / "twice")  # the same model twice
    with pytest.raises(ValueError, match="one figure shows 1 to 5 models, not 6"):
        write_measures(measured * 3, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def check_page(page, models, figure):
    """The figure, and each number of the JSON in a table of its model."""
    (source,) = re.findall(r'<img [^>]*src="([^"]*)"', page)
    assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) == figure
    assert "<script" not in page
    assert not re.findall(r"(?:href|srcset)=|url\(|@import", page)
    style = page.split("<style>")[1].split("</style>")[0]
    assert set(re.findall(r"var\((--\w+)", style)) <= set(re.findall(r"(--\w+):", style)) | {
        "--share"
    }  # each color is defined
    _, *parts = re.split("<h2>(?=a |LocalViT)", page)
    for part, model in zip(parts, models, strict=True):
        assert part.startswith(f"{html.escape(model['model'])}</h2>")
        rows = [
            [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall("<tr><th scope=.row.*?</tr>", part.replace("\n", " "))
        ]
        for each, row in zip(model["accuracy"], rows, strict=False):
            assert float(row[1]) == pytest.approx(each["acc1"], abs=0.006)
            if each["without"]:
                assert [float(cell) for cell in row[2:]] == pytest.approx(
                    [each["change"], each["standard_error"]], abs=0.006
                )
        del rows[: len(model["accuracy"])]
        for each in model["attention_distance"]:
            pixels = each["pixels"]
            expected = [np.mean(pixels), min(pixels), max(pixels), each["equal_attention"]]
            assert [float(cell) for cell in rows.pop(0)[1:]] == pytest.approx(expected, abs=0.006)
        for each in model["receptive_field"] + model["receptive_field_without_neighbors"]:
            _, center, around, distance = rows.pop(0)
            assert float(distance) == pytest.approx(each["distance"], abs=0.006)
            for cell, share in ((center, each["share_center"]), (around, each["share_3x3"])):
                shown = float(re.sub("[^0-9.]", "", html.unescape(cell)))
                assert shown == pytest.approx(100 * (1 - share), abs=0.11)  # "< 0.1 %" stands for less
        assert rows == []


@pytest.mark.parametrize("name", [name for name in LOCAL if name in ONE_OF_EACH])
def test_every_family_has_fields_and_reaches(name):
    model, images = shaken(name)
    for each in (model, localvit.fuse(model)):
        fields = receptive_fields(each, images)
        assert len(fields) == len(layers_of(each).blocks)
        assert all(field.shape == images.shape[-2:] and field.any() for field in fields.values())
