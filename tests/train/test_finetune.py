"""Fine-tuning begins with the weights that it should, for every family, size and number of classes, or not at all."""

import copy
import dataclasses
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
import torch.nn.functional as F

import localvit
from localvit.checkpoints import make_header
from localvit.data.classes import imagenet_synsets
from localvit.data.preprocessing import Preprocessing
from localvit.models.published_names import to_published_names
from localvit.models.registry import find_model
from localvit.train.config import TrainConfig
from localvit.train.finetune import load_pretrained
from localvit.train.model import build_model
from localvit.utils.weight_files import CheckpointError
from published import published_state

NANO = ("localvit_nano_patch4_32", {"depth": 2})
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 4}
SWIN = {"embed_dim": 24, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 4}
TNT = {"depth": 2, "embed_dim": 48, "inner_dim": 12, "num_heads_inner": 3, "num_heads_outer": 3}
PVT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
PVT_GRIDS = {
    "stages.0.pos_embed": ((16, 16), (24, 40), 0),
    "stages.1.pos_embed": ((8, 8), (12, 20), 0),
    "stages.2.pos_embed": ((4, 4), (6, 10), 0),
    "stages.3.pos_embed": ((2, 2), (3, 5), 1),
}
# Offsets reach from 1 - side to side - 1, and a window is no larger than its stage's grid.
SWIN_GRIDS = {
    "layers.2.blocks.0.attn.relative_position_bias_table": ((7, 7), (7, 3), None),
    "layers.3.blocks.0.attn.relative_position_bias_table": ((3, 3), (5, 1), None),
}
BEIT_GRIDS = {f"blocks.{block}.attn.relative_position_bias_table": ((7, 7), (5, 9), None) for block in range(2)}
FAMILIES = {
    "vit": (*NANO, (24, 24), (28, 44), {"pos_embed": ((6, 6), (7, 11), 1)}),
    "distilled": (NANO[0], {"depth": 2, "distilled": True}, (24, 24), (28, 44), {"pos_embed": ((6, 6), (7, 11), 2)}),
    "pvt": ("localvit_pvt_tiny", PVT, (64, 64), (96, 160), PVT_GRIDS),
    "tnt": ("localvit_tnt_tiny", TNT, (64, 64), (48, 80), {"patch_pos": ((4, 4), (3, 5), 1)}),
    "t2t": ("localvit_t2t_7", VIT | {"reduction": 4}, (64, 64), (48, 80), {"pos_embed": ((4, 4), (3, 5), 1)}),
    "swin": ("localvit_swin_tiny", SWIN, (64, 64), (96, 32), SWIN_GRIDS),
    "plain tnt": ("tnt_tiny", TNT, (64, 64), (48, 80), {"patch_pos": ((4, 4), (3, 5), 1)}),
    "timm vit": ("vit_tiny_patch16_224", VIT, (64, 64), (48, 80), {"pos_embed": ((4, 4), (3, 5), 1)}),
    "timm deit": ("deit_tiny_distilled_patch16_224", VIT, (64, 64), (48, 80), {"pos_embed": ((4, 4), (3, 5), 2)}),
    "timm swin": ("swin_tiny_patch4_window7_224", SWIN, (64, 64), (96, 32), SWIN_GRIDS),
    "timm beit": ("beit_base_patch16_224", VIT, (64, 64), (48, 80), BEIT_GRIDS),
    "timm resnet": ("resnet10t", {}, None, None, {}),
    "timm efficientnet": ("test_efficientnet", {}, None, None, {}),
}
"""A name, arguments that make it small, two image sizes, and each position entry's two grids and prefix tokens."""
DYNAMIC = ["vit", "distilled", "pvt", "tnt", "t2t", "plain tnt"]
"""Families that accept images of other sizes without an argument, by resampling their position embeddings."""


def make(name, arguments, img_size=None, num_classes=5, seed=0):
    torch.manual_seed(seed)
    return localvit.create_model(
        name, num_classes=num_classes, **arguments, **({"img_size": img_size} if img_size else {})
    )


def shaken(model, seed=7):
    """The model with random weights and statistics, so that nothing is as it was initialized."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.rand(value.shape, generator=generator)
    return model


def random_images(img_size, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *(img_size or (64, 64)), generator=generator)


def saved(model, path, kind, **about):
    """The model in a file of each kind that `--finetune` takes."""
    if kind == "ours":
        return str(localvit.save_checkpoint(model, path.with_suffix(".safetensors"), **about))
    if kind == "published":
        return str(localvit.save_checkpoint(model, path.with_suffix(".pth"), layout="published"))
    entries = model.state_dict()
    if kind == "state":  # of a training run: published names, and ours of how the model was made
        about = {"class_names": None, "preprocessing": None, "about": None} | about
        entries = {"model": to_published_names(model, entries), "localvit": make_header(model, **about), "epoch": 3}
    torch.save(entries, path.with_suffix(".pt"))
    return str(path.with_suffix(".pt"))


def head_entries(model):
    return {key for key in model.state_dict() if key.startswith(("head", "fc.", "classifier."))}


def same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["ours", "published", "plain", "state"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_classes_same_features(family, kind, tmp_path, caplog):
    name, arguments, img_size, _, _ = FAMILIES[family]
    source = shaken(make(name, arguments, img_size)).eval()
    path = saved(source, tmp_path / "source", kind)
    model = make(name, arguments, img_size, num_classes=3, seed=1)
    fresh = copy.deepcopy(model.state_dict())
    parameters = {key: (parameter, parameter.requires_grad) for key, parameter in model.named_parameters()}
    load_pretrained(model, path, class_names=["a", "b", "c"])
    assert caplog.messages == [f"{path}: its head for 5 classes is not used: the model has 3 classes"]
    assert all(module.training for module in model.modules())
    for key, parameter in model.named_parameters():
        assert parameter is parameters[key][0], key
        assert parameter.requires_grad == parameters[key][1], key
    heads = head_entries(model)
    assert heads
    for key, value in model.state_dict().items():
        same(value, (fresh if key in heads else source.state_dict())[key])
    images = random_images(img_size)
    same(model.eval().forward_features(images), source.forward_features(images))


def interpolated(entry, old_grid, new_grid, num_prefix_tokens):
    """An entry on another grid, in float64: absolute positions (1, P + N, C), or offsets (R, M) where P is None."""
    absolute = num_prefix_tokens is not None
    rows = entry.double()[0] if absolute else entry.double()
    # Class tokens stand before the positions, and their biases behind the offsets.
    first = num_prefix_tokens if absolute else 0
    kept = [rows[:first], rows[first + old_grid[0] * old_grid[1] :]]
    grid = rows[first : first + old_grid[0] * old_grid[1]].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    moved = F.interpolate(grid, new_grid, mode="bicubic", antialias=absolute, align_corners=False)
    moved = moved[0].flatten(1).T
    rows = torch.cat([kept[0], moved, kept[1]])
    return rows[None] if absolute else rows


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family][3]])
def test_positions_on_another_grid(family, tmp_path, caplog):
    name, arguments, img_size, other_size, grids = FAMILIES[family]
    source = shaken(make(name, arguments, img_size)).eval()
    path = saved(source, tmp_path / "source", "ours")
    model = make(name, arguments, other_size, num_classes=3, seed=1).double()
    load_pretrained(model, path)
    assert caplog.messages[1:] == [f"{path}: position embeddings ({', '.join(grids)}) resampled to the model's grid"]
    heads = head_entries(model)
    for key, value in model.state_dict().items():
        if key in grids:
            # float32 interpolation of values of order one against float64
            torch.testing.assert_close(value, interpolated(source.state_dict()[key], *grids[key]), rtol=1e-5, atol=1e-6)
        elif key not in heads:
            torch.testing.assert_close(value, source.state_dict()[key], rtol=0, atol=0, check_dtype=False)
    images = random_images(other_size)
    features = model.float().eval().forward_features(images)
    assert torch.isfinite(features).all()
    if family in DYNAMIC:
        # The same resampling once and for all as in the forward; float32 sums in another order.
        torch.testing.assert_close(features, source.forward_features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "img_size", "other_size", "grids"),
    [
        ("vit", (20, 80), (40, 40), {"pos_embed": ((5, 20), (10, 10), 1)}),
        ("timm vit", (80, 320), (160, 160), {"pos_embed": ((5, 20), (10, 10), 1)}),
        ("swin", (96, 32), (64, 64), {key: (new, old, None) for key, (old, new, _) in SWIN_GRIDS.items()}),
        ("timm swin", (96, 32), (64, 64), {key: (new, old, None) for key, (old, new, _) in SWIN_GRIDS.items()}),
    ],
)
def test_resampling_back_from_a_rectangular_image(family, img_size, other_size, grids, tmp_path):
    """The old grid is the file's own, not the square root of a count: 5 x 20 patches would pass for 10 x 10."""
    name, arguments, *_ = FAMILIES[family]
    source = shaken(make(name, arguments, img_size))
    model = make(name, arguments, other_size, num_classes=3)
    load_pretrained(model, saved(source, tmp_path / "source", "ours"))
    for key, grid in grids.items():
        expected = interpolated(source.state_dict()[key], *grid).float()
        # float32 interpolation of values of order one against float64
        torch.testing.assert_close(model.state_dict()[key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("size", [(32, 32), (28, 44)])
def test_a_file_without_an_image_size(kind, size, tmp_path):
    """It is the released models' (32 x 32) or the model's own, whichever its positions fill."""
    source = shaken(make(*NANO, size))
    model = make(*NANO, (28, 44), num_classes=3)
    load_pretrained(model, saved(source, tmp_path / "source", kind))
    expected = source.pos_embed if size == (28, 44) else interpolated(source.pos_embed, (8, 8), (7, 11), 1).float()
    torch.testing.assert_close(model.pos_embed.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


ABC = ["ape", "bat", "cat"]


@pytest.mark.parametrize(
    ("source_names", "names", "reason"),
    [
        (ABC, ABC, None),
        (ABC, ["ape", "bat", "cow"], "the model has class 'cow' where it has 'cat'"),
        (ABC, ["bat", "ape", "cat"], "the model has class 'bat' where it has 'ape'"),
        (None, ABC, "its class names are not known"),
        (ABC, None, "the model's class names are not known"),
        (ABC, ["ape", "bat"], "the model has 2 classes"),
        (ABC, [*ABC, "dog"], "the model has 4 classes"),
    ],
)
@pytest.mark.parametrize("distilled", [False, True])
def test_the_head_loads_where_the_classes_are_the_same(source_names, names, reason, distilled, tmp_path, caplog):
    arguments = NANO[1] | {"distilled": distilled}
    source = shaken(make(NANO[0], arguments, num_classes=3))
    path = saved(source, tmp_path / "source", "ours", class_names=source_names)
    model = make(NANO[0], arguments, num_classes=len(names or ABC), seed=1)
    fresh = copy.deepcopy(model.state_dict())
    load_pretrained(model, path, class_names=names)
    assert caplog.messages == ([f"{path}: its head for 3 classes is not used: {reason}"] if reason else [])
    heads = ["head.weight", "head.bias", *(["head_dist.weight", "head_dist.bias"] if distilled else [])]
    for key in heads:
        same(model.state_dict()[key], (fresh if reason else source.state_dict())[key])


@pytest.mark.parametrize(
    ("names", "loads"), [(None, True), (imagenet_synsets(), True), ([str(number) for number in range(1000)], False)]
)
def test_1000_unnamed_classes_are_imagenets(names, loads, tmp_path):
    source = shaken(make(*NANO, num_classes=1000))
    model = make(*NANO, num_classes=1000, seed=1)
    load_pretrained(model, saved(source, tmp_path / "source", "published"), class_names=names)
    assert torch.equal(model.head.weight, source.head.weight) == loads


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Put a file on a server as the released weights of a model."""
    (tmp_path / "release").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "release")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def release(name, content):
        info = find_model(name)
        file = info.file if info else f"{name}.pth"
        torch.save(content, tmp_path / "release" / file)
        address = f"http://127.0.0.1:{server.server_port}/"
        if info:
            monkeypatch.setattr("localvit.models.registry.RELEASE", address)
            return
        cfg = timm.get_pretrained_cfg(name)
        url = address + file
        served = dataclasses.replace(cfg, url=url, hf_hub_id=None, file=None, custom_load=False)
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, served)

    yield release
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("num_classes", [1000, 7])
def test_released_weights_of_ours(num_classes, released, caplog):
    state = published_state("localvit_tiny_mlp4_act3_r192")
    released("localvit_tiny_mlp4_act3_r192", {"model": state})
    model = make("localvit_tiny_mlp4_act3_r192", {}, (160, 208), num_classes)
    fresh = model.head.weight.detach().clone()
    load_pretrained(model, "localvit_tiny_mlp4_act3_r192")
    same(model.head.weight.detach(), state["head.weight"] if num_classes == 1000 else fresh)
    same(model.blocks[5].mlp.conv[3].weight.detach(), state["blocks.5.conv.conv.3.weight"])
    expected = interpolated(state["pos_embed"], (14, 14), (10, 13), 1).float()
    # float32 interpolation of values of order one against float64
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=1e-5, atol=2e-6)
    assert len(caplog.messages) == (1 if num_classes == 1000 else 2)


def test_released_weights_of_timms(released):
    source = shaken(make("test_vit", {}, num_classes=1000))
    released("test_vit", source.state_dict())
    model = make("test_vit", {}, (96, 208))
    load_pretrained(model, "test_vit")
    same(model.blocks[1].mlp.fc1.weight.detach(), source.blocks[1].mlp.fc1.weight.detach())
    expected = interpolated(source.pos_embed.detach(), (10, 10), (6, 13), 1).float()
    # float32 interpolation of values of order one against float64
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=1e-5, atol=1e-6)


def research_swin(source, path):
    """A file of the research code: it merges patches at a stage's end, names the head otherwise, stores more."""
    entries = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16),
        "layers.1.attn_mask": torch.ones(3),
    }
    for key, value in source.state_dict().items():
        for stage in (1, 2, 3):
            if key.startswith(f"layers.{stage}.downsample"):
                key = key.replace(f"layers.{stage}", f"layers.{stage - 1}")
                break
        entries[key.replace("head.fc.", "head.")] = value
    torch.save({"model": entries}, path)
    return str(path)


def test_timm_swin_from_a_file_of_the_research_code(tmp_path):
    source = shaken(make("swin_tiny_patch4_window7_224", SWIN)).eval()
    model = make("swin_tiny_patch4_window7_224", SWIN, num_classes=3, seed=1)
    load_pretrained(model, research_swin(source, tmp_path / "swin.pth"))
    images = random_images((224, 224))
    same(model.eval().forward_features(images), source.forward_features(images))


def test_another_window_size_is_refused(tmp_path):
    """timm would take a table of unknown origin to be of a square window, and resample it."""
    source = make("swin_tiny_patch4_window7_224", SWIN | {"window_size": 3})
    model = make("swin_tiny_patch4_window7_224", SWIN)
    with pytest.raises(
        CheckpointError, match=r"5 of another shape \(layers\.0\.blocks\.0\.attn\.relative_position_bias"
    ):
        load_pretrained(model, research_swin(source, tmp_path / "swin.pth"))


def test_different_arguments_are_a_warning(tmp_path, caplog):
    """Shapes agree, but not what is computed."""
    source = make(NANO[0], NANO[1] | {"act": "relu6", "drop_path_rate": 0.3})
    path = saved(source, tmp_path / "source", "ours", class_names=list("abcde"))
    model = make(NANO[0], NANO[1] | {"act": "hs"})
    load_pretrained(model, path, class_names=list("abcde"))
    assert len(caplog.messages) == 1
    assert 'act "relu6", here "hs"' in caplog.messages[0]
    assert "drop_path_rate" not in caplog.messages[0]


def _nothing(tmp_path):
    return str(tmp_path / "nowhere.pth")


def _folder(tmp_path):
    return str(tmp_path)


def _cut_off(tmp_path):
    path = saved(make(*NANO), tmp_path / "cut", "published")
    with open(path, "r+b") as file:  # noqa: PTH123 (text is what Path writes)
        file.truncate(5000)
    return path


def _other_family(kind, tmp_path):
    return saved(make("localvit_pvt_tiny", PVT, (64, 64)), tmp_path / "pvt", kind)


def _other_depth(tmp_path):
    return saved(make(NANO[0], {"depth": 3}), tmp_path / "deep", "ours")


def _missing_and_surplus(tmp_path):
    state = make(*NANO).state_dict()
    del state["norm.bias"]
    torch.save({"model": state | {"extra.weight": torch.zeros(2)}}, tmp_path / "keys.pth")
    return str(tmp_path / "keys.pth")


def _released_otherwise(tmp_path):
    torch.save({"model": published_state("localvit_swin_tiny_patch4_window7_224")}, tmp_path / "swin.pth")
    return str(tmp_path / "swin.pth")


def _positions_of_no_known_size(tmp_path):
    return saved(make(*NANO, (20, 20)), tmp_path / "twenty", "plain")


def _distilled(kind, tmp_path):
    return saved(make(NANO[0], NANO[1] | {"distilled": True}), tmp_path / "distilled", kind)


@pytest.mark.parametrize(
    ("source", "error", "parts"),
    [
        (_nothing, FileNotFoundError, ["nowhere.pth"]),
        (_folder, CheckpointError, ["is a folder"]),
        (_cut_off, CheckpointError, ["cut.pth", "truncated"]),
        (
            partial(_other_family, "ours"),
            CheckpointError,
            ["does not fit", "localvit_pvt_tiny", "missing (", "unexpected ("],
        ),
        (
            partial(_other_family, "plain"),
            CheckpointError,
            ["does not fit", "missing (", "of another shape (cls_token"],
        ),
        (_other_depth, CheckpointError, [NANO[0], "unexpected (blocks.2."]),
        (_missing_and_surplus, CheckpointError, ["1 missing (norm.bias)", "1 unexpected (extra.weight)"]),
        (_released_otherwise, CheckpointError, ["it is a localvit_swin_tiny_patch4_window7_224"]),
        (_positions_of_no_known_size, CheckpointError, ["for 25 patches", "does not say their size", "--input-size"]),
        (partial(_distilled, "ours"), CheckpointError, ["has a distillation token", "distilled=true"]),
        (partial(_distilled, "plain"), CheckpointError, ["has a distillation token", "distilled=true"]),
        (lambda _: "localvit_tinny", ValueError, ["'localvit_tinny'", "localvit_tiny"]),
        (lambda _: "localvit_tiny_mlp6_act1", CheckpointError, ["no weights of localvit_tiny_mlp6_act1 were released"]),
    ],
)
def test_errors_are_one_line_and_the_model_is_unchanged(source, error, parts, tmp_path):
    model = make(*NANO, (36, 28), num_classes=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as refusal:
        load_pretrained(model, source(tmp_path))
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    for key, value in model.state_dict().items():
        same(value, before[key])


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_a_distilled_model_needs_a_distilled_source(kind, tmp_path):
    path = saved(make(*NANO), tmp_path / "source", kind)
    with pytest.raises(CheckpointError, match=r"the model has a distillation token, and .* has neither"):
        load_pretrained(make(NANO[0], NANO[1] | {"distilled": True}), path)


def test_a_model_without_a_record_of_its_arguments(tmp_path):
    path = saved(make(*NANO), tmp_path / "source", "ours")
    with pytest.raises(ValueError, match=r"arguments; create it with localvit\.create_model"):
        load_pretrained(timm.create_model(NANO[0]), path)
    with pytest.raises(ValueError, match="2 class names for a model with 5 classes"):
        load_pretrained(make(*NANO), path, class_names=["a", "b"])


@pytest.mark.parametrize("kind", ["ours", "state", "plain"])
def test_preprocessing_is_that_of_the_weights(kind, tmp_path):
    """It is stored in our checkpoints; other files are assumed to match timm's released weights of the model."""
    arguments = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": (16, 16)}
    stored = Preprocessing(input_size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.6, 0.7))
    about = {"preprocessing": stored.to_dict()} if kind != "plain" else {}
    name = "vit_tiny_patch16_224"  # its released weights use 0.5 for each
    source = saved(localvit.create_model(name, num_classes=3, **arguments), tmp_path / "source", kind, **about)
    size = {"model_args": {key: arguments[key] for key in arguments if key != "img_size"}, "input_size": (16,)}
    config = TrainConfig(model=name, finetune=source, **size)
    _, preprocessing = build_model(config, 3, ["0", "1", "2"])
    expected = stored if kind != "plain" else Preprocessing(input_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert (preprocessing.mean, preprocessing.std) == (expected.mean, expected.std)
    fresh = TrainConfig(model=name, **size)
    assert build_model(fresh, 3, ["0", "1", "2"])[1].mean == pytest.approx((0.485, 0.456, 0.406))
