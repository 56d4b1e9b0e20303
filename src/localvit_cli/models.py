"""`localvit models`: the models of this package with their size, cost and published accuracy."""

import json
from dataclasses import dataclass
from typing import Any

from localvit.inference.cost import count_multiply_adds, count_parameters
from localvit.models.zoo import OWN_MODELS, ZOO, create_model, published_model
from localvit.utils.tables import format_table, wrap_text

_HEADINGS = ("model", "paper", "params (M)", "GMACs", "input", "Acc@1", "Acc@5")
_NOTES = (
    "Params are in millions, GMACs in billions of multiply-adds for one image (half the FLOPs). Input is the side of "
    "the images in pixels. Acc@1 and Acc@5, in percent, are the published accuracy of the released weights on "
    "ImageNet-1k val."
)


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models with their size, cost and published accuracy."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Count the parameters and multiply-adds of every model, and print the list."""
        models = [_facts(name) for name in (*(model.name for model in ZOO), *OWN_MODELS)]
        print(json.dumps(models, indent=2) if self.json else _text(models))


def _facts(name: str) -> dict[str, Any]:
    published = published_model(name)
    model: Any = create_model(name, device="meta")
    input_size = model.pretrained_cfg["input_size"]
    return {
        "name": name,
        "friendly_name": published.friendly if published else None,
        "paper_name": published.paper_name if published else None,
        "parameters": count_parameters(model),
        "multiply_adds": count_multiply_adds(model, input_size),
        "input_size": list(input_size),
        "acc1": published.acc1 if published else None,
        "acc5": published.acc5 if published else None,
        "loss": published.loss if published else None,
        "weights_url": published.url if published else None,
    }


def _text(models: list[dict[str, Any]]) -> str:
    """The list under the short names, and the published names of those that have both."""
    rows = [
        (
            model["friendly_name"] or model["name"],
            model["paper_name"] or "-",
            f"{model['parameters'] / 1e6:.2f}",
            f"{model['multiply_adds'] / 1e9:.3f}",
            _side(*model["input_size"][1:]),
            f"{model['acc1']:.3f}" if model["acc1"] else "-",
            f"{model['acc5']:.3f}" if model["acc5"] else "-",
        )
        for model in models
    ]
    names = [(model["friendly_name"], model["name"]) for model in models if model["friendly_name"]]
    released = [model["friendly_name"] or model["name"] for model in models if model["weights_url"]]
    return "\n\n".join(
        (
            format_table(rows, headings=_HEADINGS, right=(2, 3, 4, 5, 6)),
            format_table(names, headings=("model", "published name (also accepted)")),
            wrap_text(f"Weights are released for {', '.join(released)}."),
            wrap_text(_NOTES),
        )
    )


def _side(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"
