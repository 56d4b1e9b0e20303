"""Which models can be localized? Runs one of each family and writes the table in docs/localize.md.

    python benchmarks/localize_support.py [--doc docs/localize.md]

Each model has random weights (large ones two blocks only). It is run in float64 on a random image, localized, and run
again; then its feed-forwards are replaced by the paper's module. Nothing is downloaded. Without `--doc` the table goes
to the standard output.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import localvit
from localvit.surgery.localize import locality_modules

START, END = "<!-- support table -->", "<!-- end of support table -->"

TIMM = {
    "beit": ("beit_base_patch16_224", {"depth": 2}),
    "cait": ("cait_xxs24_224", {}),
    "coat": ("coat_tiny", {}),
    "convit": ("convit_tiny", {}),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "davit": ("davit_tiny", {}),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 2}),
    "hiera": ("hiera_tiny_224", {}),
    "hieradet_sam2": ("sam2_hiera_tiny", {}),
    "levit": ("levit_128s", {}),
    "maxxvit": ("maxvit_pico_rw_256", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 2}),
    "nest": ("nest_tiny", {}),
    "pit": ("pit_ti_224", {}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 2}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_patch16_224", {}),
    "twins": ("twins_svt_small", {}),
    "vision_transformer": ("vit_tiny_patch16_224", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"depth": 2}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "xcit": ("xcit_nano_12_p16_224", {}),
}
"""The smallest model of each family, with two blocks only if it has more than 80 million parameters."""

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 16, "image_size": 224}
SIGLIP2 = SMALL | {"intermediate_size": 96, "num_patches": 196}
TRANSFORMERS = {
    "ViT": ("ViTModel", "ViTConfig", SMALL | {"intermediate_size": 96}),
    "DeiT": ("DeiTModel", "DeiTConfig", SMALL | {"intermediate_size": 96}),
    "DINOv2": ("Dinov2Model", "Dinov2Config", SMALL),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SMALL),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", SMALL | {"intermediate_size": 96}),
    "BEiT": ("BeitModel", "BeitConfig", SMALL | {"intermediate_size": 96}),
    "CLIP vision": ("CLIPVisionModel", "CLIPVisionConfig", SMALL | {"intermediate_size": 96}),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", SMALL | {"intermediate_size": 96}),
    "SigLIP 2": ("Siglip2VisionModel", "Siglip2VisionConfig", SIGLIP2),
    "SegFormer": ("SegformerModel", "SegformerConfig", {"depths": [1, 1, 1, 1]}),
    "Swin": ("SwinModel", "SwinConfig", {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6]}),
}
"""Small configurations."""


def hosts() -> Iterator[tuple[str, str, nn.Module, tuple[Tensor, ...]]]:
    """Yields library and name, family, model, and the inputs of the model."""
    for family, (name, kwargs) in TIMM.items():
        model: Any = localvit.create_model(name, **kwargs)
        yield f"timm: {name}", family, model, (torch.randn(1, *model.pretrained_cfg["input_size"]),)
    import transformers

    for family, (model_class, config_class, kwargs) in TRANSFORMERS.items():
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**kwargs))
        inputs: tuple[Tensor, ...] = (torch.randn(1, 3, 224, 224),)
        if family == "SigLIP 2":
            shapes = torch.tensor([[14, 14], [7, 20]])
            inputs = (torch.randn(2, 196, 768), (torch.arange(196) < shapes.prod(1, keepdim=True)).long(), shapes)
        yield f"transformers: {model_class}", family, model, inputs


def output_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    out = model(*(value.double() if value.is_floating_point() else value for value in inputs))
    out = getattr(out, "last_hidden_state", out)
    return out[0] if isinstance(out, tuple | list) else out


@torch.no_grad()
def row(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """Number of feed-forwards, parameters added, change of the output, and whether `Replace` is supported."""
    for parameter in model.parameters():  # so that no layer scale or head of zeros hides a change
        parameter.add_(0.05 * torch.randn_like(parameter))
    model.double().eval()
    before = output_of(model, inputs)
    localized = localvit.localize(model)
    change = ((output_of(localized, inputs) - before).abs().max() / before.abs().max()).item()
    adapters = locality_modules(localized).values()
    added = sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())
    try:
        replaced = localvit.localize(model, localvit.Replace(), inplace=True)
        assert output_of(replaced, inputs).isfinite().all()
        supported = "yes"
    except ValueError as error:
        supported = str(error).partition(": ")[2].partition(": create the model")[0]
    return [str(len(adapters)), f"{added:,}", f"{change:.0e}" if change else "0", supported]


def table() -> str:
    lines = [
        "| family | model | feed-forwards | parameters added | change | `Replace` |",
        "|---|---|---|---|---|---|",
    ]
    for name, family, model, inputs in hosts():
        torch.manual_seed(0)
        lines.append(f"| {' | '.join([family, f'`{name}`', *row(model, inputs)])} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Make the table, and write it into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doc", type=Path)
    args = parser.parse_args()
    made = table()
    if args.doc:
        text = args.doc.read_text(encoding="utf-8")
        head, rest = text.split(START)
        args.doc.write_text(f"{head}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
