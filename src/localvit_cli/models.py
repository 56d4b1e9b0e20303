"""`localvit models`: the models of this package with their size, cost and published accuracy."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from localvit.models.registry import ModelInfo, registered_models
from localvit.utils.intervals import interval_text
from localvit.utils.tables import format_table, wrap_text

_HEADINGS = ("model", "paper", "params (M)", "GMACs", "input", "Acc@1", "Acc@5")
_NOTES = (
    "Params are in millions, GMACs in billions of multiply-adds for one image (half the FLOPs). Input is the side of "
    "the images in pixels. Acc@1 and Acc@5, in percent, are the published accuracy of the released weights on "
    "ImageNet-1k val; its 50,000 images give Acc@1 with a 95 % interval of at most 0.4 points up or down."
)


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models with their size, cost and published accuracy."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Print the list."""
        models = [_facts(info) for info in registered_models()]
        print(json.dumps(models, indent=2) if self.json else _text(models))


def _facts(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "friendly_name": info.alias,
        "paper_name": info.paper_name,
        "parameters": info.parameters,
        "multiply_adds": info.multiply_adds,
        "input_size": list(info.input_size),
        "acc1": info.acc1,
        "acc5": info.acc5,
        "loss": info.loss,
        "weights_url": info.url,
        "packaged": asdict(info.packaged) if info.packaged else None,
    }


def _text(models: list[dict[str, Any]]) -> str:
    """The list under the short names, and the published names of those that have both."""
    rows = [
        (
            model["friendly_name"] or model["name"],
            model["paper_name"] or "-",
            f"{model['parameters'] / 1e6:.2f}",
            f"{model['multiply_adds'] / 1e9:.3f}" if model["multiply_adds"] else "-",
            _side(*model["input_size"][1:]),
            f"{model['acc1']:.3f}" if model["acc1"] else "-",
            f"{model['acc5']:.3f}" if model["acc5"] else "-",
        )
        for model in models
    ]
    names = [(model["friendly_name"], model["name"]) for model in models if model["friendly_name"]]
    released = [model["friendly_name"] or model["name"] for model in models if model["weights_url"]]
    packaged = [
        f"The weights of {model['name']} are in this package: Acc@1 {model['packaged']['acc1']:.2f} % (95 % interval "
        f"{interval_text(model['packaged']['acc1'], model['packaged']['num_images'])}) on the "
        f"{model['packaged']['num_images']:,} test images of {model['packaged']['data_set']}."
        for model in models
        if model["packaged"]
    ]
    return "\n\n".join(
        (
            format_table(rows, headings=_HEADINGS, right=(2, 3, 4, 5, 6)),
            format_table(names, headings=("model", "published name (also accepted)")),
            wrap_text(f"Weights are released for {', '.join(released)}."),
            *map(wrap_text, packaged),
            wrap_text(_NOTES),
        )
    )


def _side(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"
