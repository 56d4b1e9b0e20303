"""`localvit models`: the models of this package and the numbers that they are known by."""

import json
from dataclasses import dataclass
from typing import Any

_HEADINGS = ("name", "also called", "paper", "parameters", "multiply-adds", "input", "Acc@1", "Acc@5", "weights")


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models with their size, cost and published accuracy."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Count every model and print the list."""
        from localvit.models.zoo import OWN_MODELS, ZOO

        models = [_facts(name) for name in (*(model.name for model in ZOO), *OWN_MODELS)]
        print(json.dumps(models, indent=2) if self.json else _table(models))


def _facts(name: str) -> dict[str, Any]:
    from localvit.inference.cost import count_multiply_adds, count_parameters
    from localvit.models.zoo import create_model, published_model

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


def _table(models: list[dict[str, Any]]) -> str:
    from localvit.utils.tables import columns

    rows = [
        (
            model["name"],
            model["friendly_name"] or "-",
            model["paper_name"] or "-",
            f"{model['parameters']:,}",
            f"{model['multiply_adds'] / 1e9:.3f} G",
            "x".join(map(str, model["input_size"][1:])),
            f"{model['acc1']:.3f}" if model["acc1"] else "-",
            f"{model['acc5']:.3f}" if model["acc5"] else "-",
            "released" if model["weights_url"] else "-",
        )
        for model in models
    ]
    return (
        f"{columns([_HEADINGS, *rows], right=(3, 4, 6, 7))}\n\n"
        "Multiply-adds (half the FLOPs) are of one image of the input size, height x width in pixels.\n"
        "Accuracies, in percent, are the published ones of the released weights on ImageNet-1k val."
    )
