"""Models in wrappers, changed models and plain arguments: what is written can be loaded, or nothing is written."""

import copy
import enum
import os

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import localvit
from localvit.utils.weight_files import CheckpointError

NANO = "localvit_nano_patch4_32"
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def nano(**kwargs):
    torch.manual_seed(0)
    return localvit.create_model(NANO, depth=2, **kwargs).eval()


def localized():
    torch.manual_seed(0)
    model = localvit.create_model("test_vit", img_size=32, depth=2, localize={}).eval()
    nn.init.normal_(model.blocks[1].mlp.fc2.locality.conv.weight)
    return model


def with_a_compiled_block(model):
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "AveragedModel": AveragedModel,
    "compiled block": with_a_compiled_block,
}


@pytest.mark.parametrize("make", [nano, localized])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_written_as_the_model_itself(wrap, make, tmp_path):
    expected = make()(IMAGE)
    path = localvit.save_checkpoint(wrap(make()), tmp_path / "a.safetensors")
    again, _ = localvit.model_from_checkpoint(path)
    assert torch.equal(again.eval()(IMAGE), expected)
    localvit.save_checkpoint(wrap(make()), tmp_path / "a.pth", layout="published")
    other = make()
    nn.init.zeros_(other.head.weight)
    localvit.load_checkpoint(other, tmp_path / "a.pth")
    assert torch.equal(other(IMAGE), expected)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_file_is_loaded_into_the_model_in_a_wrapper(wrap, tmp_path):
    for name in ("a.safetensors", "a.pth"):
        layout = "localvit" if name == "a.safetensors" else "published"
        path = localvit.save_checkpoint(nano(), tmp_path / name, layout=layout)
        model = nano()
        nn.init.zeros_(model.head.weight)
        localvit.load_checkpoint(wrap(model), path)
        assert torch.equal(model(IMAGE), nano()(IMAGE))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", ["model", "state_dict"])
def test_prefixes_of_wrappers_in_a_file_are_no_part_of_the_names(prefix, entry, tmp_path):
    state = {prefix + key: value for key, value in nano().state_dict().items()}
    torch.save({entry: state, f"{entry}_ema": {key: value * 0 for key, value in state.items()}}, tmp_path / "a.pth")
    model = nano()
    nn.init.zeros_(model.head.weight)
    localvit.load_checkpoint(model, tmp_path / "a.pth")
    assert torch.equal(model(IMAGE), nano()(IMAGE))
    localvit.load_checkpoint(model, tmp_path / "a.pth", weights="ema")
    assert not model.head.weight.any()


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def with_another_head(model):
    model.head = nn.Linear(96, 10, bias=False)
    return model


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.head)
    return model


def with_fewer_blocks(model):
    model.blocks = model.blocks[:1]
    return model


CHANGES = {
    "fused": (localvit.fuse, "before fuse"),
    "quantized": (quantized, "quantized"),
    "head": (with_another_head, r"1 missing \(head.bias\)"),
    "parametrized": (with_weight_norm, "parametrizations"),
    "blocks": (with_fewer_blocks, "28 missing"),
    "meta": (lambda model: model.to("meta"), "no values"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["localvit", "published"])
@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_what_could_not_be_loaded_is_not_written(change, words, layout, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        localvit.save_checkpoint(change(nano()), tmp_path / "a.safetensors", layout=layout)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_average_of_another_model_is_not_written(tmp_path):
    averaged = torch.compile(nano()).state_dict()
    localvit.save_checkpoint(nano(), tmp_path / "a.safetensors", ema=averaged)
    again, _ = localvit.model_from_checkpoint(tmp_path / "a.safetensors", "ema")
    assert torch.equal(again.eval()(IMAGE), nano()(IMAGE))
    with pytest.raises(ValueError, match="ema is not a state dict of this model: entries 64 missing"):
        localvit.save_checkpoint(nano(), tmp_path / "b.safetensors", ema={"weight": torch.zeros(3)})


@pytest.fixture
def one_process():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_gathered(one_process, tmp_path):
    model = fully_shard(nano(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert type(next(model.parameters())).__name__ == "DTensor"
    path = localvit.save_checkpoint(model, tmp_path / "a.safetensors")
    again, _ = localvit.model_from_checkpoint(path)
    assert torch.equal(again.eval()(IMAGE), nano()(IMAGE))
    with pytest.raises(CheckpointError, match="load it before fully_shard"):
        localvit.load_checkpoint(model, path)
    sharded = fully_shard(localized(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    localvit.save_locality(sharded, tmp_path / "locality.safetensors")
    base = copy.deepcopy(localvit.delocalize(localized(), discard=True))
    assert torch.equal(localvit.load_locality(base, tmp_path / "locality.safetensors")(IMAGE), localized()(IMAGE))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, ModelEmaV3])
def test_locality_of_a_wrapped_model(wrap, tmp_path):
    path = localvit.save_locality(wrap(localized()), tmp_path / "locality.safetensors")
    base = localvit.delocalize(localized(), discard=True)
    localvit.load_locality(torch.compile(base), path)
    assert torch.equal(base(IMAGE), localized()(IMAGE))


def test_locality_of_a_fused_model(tmp_path):
    """Fusing leaves adapters as they are, and folds the paper's module."""
    path = localvit.save_locality(localvit.fuse(localized()), tmp_path / "locality.safetensors")
    base = localvit.load_locality(localvit.delocalize(localized(), discard=True), path)
    assert torch.equal(base(IMAGE), localized()(IMAGE))
    replaced = localvit.localize(localvit.delocalize(base, discard=True), localvit.Replace())
    with pytest.raises(ValueError, match="before fuse"):
        localvit.save_locality(localvit.fuse(replaced.eval()), tmp_path / "b.safetensors")


def test_locality_that_could_not_be_loaded_is_not_written(tmp_path):
    for change in (nn.utils.parametrizations.weight_norm, lambda conv: prune.identity(conv, "weight")):
        model = localized()
        change(model.blocks[1].mlp.fc2.locality.conv)
        with pytest.raises(ValueError, match=r"parametrized or pruned .* before save_locality"):
            localvit.save_locality(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_under_which_a_file_could_not_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"let its name end in .safetensors"):
        localvit.save_checkpoint(nano(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"let its name end in .pth"):
        localvit.save_checkpoint(nano(), tmp_path / "a.safetensors", layout="published")
    with pytest.raises(ValueError, match=r"let its name end in .safetensors"):
        localvit.save_locality(localized(), tmp_path / "locality.pt")
    assert not list(tmp_path.iterdir())


class Activation(str, enum.Enum):  # noqa: UP042, torch has many of this kind
    RELU6 = "relu6"


PLAIN = [
    {"num_classes": np.int64(3), "embed_dim": np.int32(48), "drop_path_rate": np.float32(0.25)},
    {"img_size": torch.Size((32, 32)), "local_blocks": np.array([1])},
    {"img_size": np.array([32, 32]), "act": Activation.RELU6, "local_blocks": range(1, 2)},
    {"act": np.str_("relu6"), "qkv_bias": np.bool_(False), "local_blocks": {2, 1}},
]


@pytest.mark.parametrize("arguments", PLAIN, ids=str)
def test_scalars_and_containers_of_libraries_become_plain_arguments(arguments, tmp_path):
    model = nano(**arguments)
    about = {"loss": np.float32(0.5), "epochs": torch.tensor(3)}
    path = localvit.save_checkpoint(model, tmp_path / "a.safetensors", about=about)
    again, checkpoint = localvit.model_from_checkpoint(path)
    assert torch.equal(again.eval()(IMAGE), model(IMAGE))
    assert (checkpoint.about["loss"], checkpoint.about["epochs"]) == (0.5, 3)


def test_options_of_localize_are_plain_too(tmp_path):
    options = {"blocks": np.array([2]), "kernel_size": np.int64(5)}
    model = localvit.create_model("test_vit", img_size=32, depth=2, localize=options).eval()
    again, _ = localvit.model_from_checkpoint(localvit.save_checkpoint(model, tmp_path / "a.safetensors"))
    assert torch.equal(again.eval()(IMAGE), model(IMAGE))
    direct = localvit.localize(
        timm.create_model("test_vit", img_size=32, depth=2), localvit.Adapter(kernel_size=np.int64(5))
    )
    localvit.save_locality(direct, tmp_path / "locality.safetensors")
    localvit.load_locality(timm.create_model("test_vit", img_size=32, depth=2), tmp_path / "locality.safetensors")


def test_class_names_become_text(tmp_path):
    path = localvit.save_checkpoint(nano(num_classes=2), tmp_path / "a.safetensors", class_names=np.array([7, 8]))
    assert localvit.read_checkpoint(path).class_names == ["7", "8"]
    with pytest.raises(ValueError, match="about cannot be written"):
        localvit.save_checkpoint(nano(), tmp_path / "b.safetensors", about={"model": object()})
    assert not (tmp_path / "b.safetensors").exists()


def test_a_pool_that_was_changed_is_remembered(tmp_path):
    model = nano()
    model.reset_classifier(5, global_pool="avg")
    again, _ = localvit.model_from_checkpoint(localvit.save_checkpoint(model, tmp_path / "a.safetensors"))
    assert torch.equal(again.eval()(IMAGE), model(IMAGE))


def test_patches_that_were_changed_are_remembered(tmp_path):
    model = nano()
    model.set_input_size(img_size=64, patch_size=8)
    again, _ = localvit.model_from_checkpoint(localvit.save_checkpoint(model, tmp_path / "a.safetensors"))
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(image), model(image))
