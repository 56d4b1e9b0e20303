"""The registry of models: names, published facts, and how it shares names with timm."""

import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import localvit
from localvit.models.factory import pretrained_cfg
from localvit.models.published_names import published_key
from localvit.models.registry import ModelInfo, find_model, register_model, registered_models
from localvit.models.vit import LocalViT
from processes import run_source, start, status_of
from published import GOLDEN, golden_model

PUBLISHED = sorted(path.stem for path in (GOLDEN / "models").glob("*.json"))

ALIASES = {
    "localvit_tiny": "localvit_tiny_mlp4_act3_r192",
    "localvit_tiny_se4": "localvit_tiny_mlp4_act3_r4",
    "localvit_small": "localvit_small_mlp4_act3_r384",
    "localvit_swin_tiny": "localvit_swin_tiny_patch4_window7_224",
    "localvit_tnt_tiny": "localvit_tnt_t_patch16_224",
    "localvit_tnt_small": "localvit_tnt_s_patch16_224",
    "tnt_tiny": "tnt_t_patch16_224",
    "localvit_t2t_7": "localvit_T2t_conv7",
    "t2t_vit_7": "T2t_vit_7",
}
"""The documented aliases."""


def test_every_published_model_and_documented_alias_is_registered_here_and_with_timm():
    assert set(localvit.list_models()) >= {*PUBLISHED, *ALIASES}
    assert {alias: find_model(alias).name for alias in ALIASES} == ALIASES
    assert set(timm.list_models(module="models")) == set(localvit.list_models())


@pytest.mark.parametrize("info", registered_models(), ids=lambda info: info.name)
def test_the_number_of_parameters_is_the_stated_one(info):
    """Under its own name; `test_an_alias_makes_the_same_model` compares the other one."""
    model = localvit.create_model(info.name, device="meta")
    for made in (model, timm.create_model(info.name, device="meta")):
        assert sum(parameter.numel() for parameter in made.parameters()) == info.parameters
    if info.name in PUBLISHED:
        buffers = {published_key(model, key): value.numel() for key, value in model.named_buffers()}
        published = golden_model(info.name)
        not_trained = sum(buffers.get(key, 0) for key, _, kind in published["state_dict"] if kind != "buffer")
        assert info.parameters + not_trained == published["parameters"]
        assert info.paper_name


def test_models_of_this_package_do_not_mix_with_timms_modules():
    """timm groups models by the last component of the module's name, and has a module `tnt` too."""
    assert "tnt_s_patch16_224" in timm.list_models(module="tnt")
    for module in ("tnt", "vision_transformer", "swin_transformer"):
        assert not set(timm.list_models(module=module)) & set(localvit.list_models())


def test_timms_pretrained_configurations_have_the_released_files():
    for info in registered_models():
        for name in info.names:
            cfg = timm.get_pretrained_cfg(name)
            assert (cfg.url or None, cfg.input_size, cfg.num_classes) == (info.url, info.input_size, info.num_classes)
            assert cfg.tag == ("in1k" if info.file else info.packaged.tag if info.packaged else "untrained")
    assert pretrained_cfg("localvit_tiny").url.endswith("/v1.0.0/localvit_t.pth")
    assert pretrained_cfg("resnet18").architecture == "resnet18"


def test_tags_choose_the_weights_as_in_timm():
    model = localvit.create_model("localvit_tiny.in1k", device="meta")
    assert isinstance(model, LocalViT)
    with pytest.raises(ValueError, match=r"no weights with the tag 'in22k', only 'in1k'"):
        localvit.create_model("localvit_tiny.in22k", device="meta")


def test_every_model_is_a_function_of_the_package():
    model = localvit.models.localvit_nano_patch4_32(num_classes=3)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_name_is_registered_only_once():
    info = find_model("localvit_tiny")
    with pytest.raises(ValueError, match="'localvit_tiny' is registered for LocalViT"):
        register_model(ModelInfo(name="another", alias="localvit_tiny", family=LocalViT, parameters=1))
    assert find_model("localvit_tiny") is info
    assert find_model("another") is None


def test_an_unknown_name_suggests_each_name_once():
    with pytest.raises(ValueError, match="did you mean") as error:
        localvit.create_model("localvit_tinny")
    suggested = str(error.value).split("did you mean ")[1].rstrip("?").split(" or ")
    assert len(suggested) == len(set(suggested)) > 1
    assert suggested[0] == "localvit_tiny"


def test_only_architecture_arguments_are_kept():
    model = localvit.create_model(
        "localvit_nano_patch4_32",
        num_classes=3,
        drop_rate=None,
        device="meta",
        pretrained_cfg_overlay={"crop_pct": 0.9},
    )
    assert model.made_from == {"name": "localvit_nano_patch4_32", "args": {"num_classes": 3}}


TIMM_FIRST = """
    import sys, timm, torch
    from timm.models import generate_default_cfgs, register_model

    class Theirs(torch.nn.Linear):
        pass

    def pvt_tiny(pretrained=False, **kwargs):
        return Theirs(1, 1)

    default_cfgs = generate_default_cfgs({"pvt_tiny.theirs": {"url": "https://example.org/theirs.pth"}})
    register_model(pvt_tiny)
"""
TIMM_LATER = TIMM_FIRST.replace("register_model(pvt_tiny)", "import localvit, warnings\n") + (
    "    warnings.simplefilter('ignore')\n    register_model(pvt_tiny)\n"
)
CHECKS = """
    import localvit
    from localvit.models.pvt import LocalPVT

    assert type(timm.create_model("pvt_tiny")) is Theirs
    assert timm.get_pretrained_cfg("pvt_tiny").url == "https://example.org/theirs.pth"

    ours = localvit.create_model("pvt_tiny", num_classes=3)
    assert type(ours) is LocalPVT
    assert not ours.pretrained_cfg.get("url")
    assert localvit.list_models().count("pvt_tiny") == 1
    assert type(localvit.models.pvt_tiny(num_classes=3)) is LocalPVT
    localvit.save_checkpoint(ours, sys.argv[1])
    again, checkpoint = localvit.model_from_checkpoint(sys.argv[1])
    assert type(again) is LocalPVT and checkpoint.name == "pvt_tiny"
    assert torch.equal(again.head.weight, ours.head.weight)
    assert type(timm.create_model("localvit_pvt_tiny")) is LocalPVT
"""


def test_a_timm_model_of_the_same_name_is_never_replaced(tmp_path):
    """A timm that has `pvt_tiny` keeps it, and in localvit the name still means our model."""
    code = textwrap.dedent(TIMM_FIRST) + textwrap.dedent(CHECKS)
    code += 'assert "pvt_tiny" not in timm.list_models(module="models")\n'
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:localvit", "-c", code, str(tmp_path / "pvt.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_timm_model_that_is_registered_later_replaces_none_of_ours(tmp_path):
    """In a process that has imported localvit. Older versions of timm keep listing a replaced name there."""
    code = textwrap.dedent(TIMM_LATER) + textwrap.dedent(CHECKS)
    err = tmp_path / "err"
    process = start(run_source, code, tmp_path / "pvt.safetensors", err=err)
    assert status_of(process) == 0, err.read_text()
