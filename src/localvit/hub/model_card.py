"""The model card: the README.md that the hub shows, with the numbers of the run as far as the checkpoint has them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from localvit.inference.calibration import Calibration
from localvit.inference.cost import count_parameters
from localvit.inference.runner import LoadedModel
from localvit.models.registry import find_model
from localvit.utils.intervals import interval_text

_METRICS = {
    "test_acc1": "top-1 accuracy, %",
    "test_acc5": "top-5 accuracy, %",
    "test_loss": "loss, nats",
    "train_loss": "training loss, nats",
}
"""Entries of a run's metrics that the card shows, and what they are."""
_SETTINGS = (
    *("data_set", "epochs", "batch_size", "opt", "lr", "weight_decay", "sched", "warmup_epochs", "ema_decay", "seed"),
    *("auto_augment", "mixup", "cutmix", "random_erasing", "label_smoothing", "distillation", "teacher"),
)
"""Settings of the run that the card shows. config.json has them all."""
_SHOWN_CLASSES = 50
_CITATION = """\
```bibtex
@article{li2021localvit,
  title   = {LocalViT: Bringing Locality to Vision Transformers},
  author  = {Li, Yawei and Zhang, Kai and Cao, Jiezhang and Timofte, Radu and Magno, Michele and Benini, Luca and \
Van Gool, Luc},
  journal = {arXiv preprint arXiv:2104.05707},
  year    = {2021}
}
```"""


def model_card(loaded: LoadedModel, header: Mapping[str, Any], title: str) -> str:
    """The text of the card.

    Args:
        loaded: the model.
        header: what `make_header` says about it.
        title: its heading, and its name in the examples.
    """
    sections = [
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n"
        "tags:\n- image-classification\n- timm\n- transformers\n- localvit\n---",
        f"# {title}",
        _summary(loaded, header),
        *_results(header["about"]),
        *_calibration(header["about"]),
        f"## Use\n\n{_usage(title)}",
        *_classes(header["class_names"]),
        *_training(header["about"]),
        f"## Citation\n\n{_CITATION}",
    ]
    return "\n\n".join(sections) + "\n"


def _summary(loaded: LoadedModel, header: Mapping[str, Any]) -> str:
    info = find_model(header["name"])
    preprocessing = loaded.preprocessing
    rows = [
        ("architecture", f"`{header['name']}`" + (f" ({info.paper_name})" if info and info.paper_name else "")),
        ("arguments", f"`{json.dumps(header['args'])}`"),
        ("parameters", f"{count_parameters(loaded.model):,}"),
        ("classes", str(header["args"]["num_classes"])),
        ("images", str(preprocessing)),
        ("mean, std", f"{_numbers(preprocessing.mean)}; {_numbers(preprocessing.std)}"),
    ]
    kind = "An image classifier with locality in its feed-forwards" if _is_local(header) else "An image classifier"
    return f"{kind}, written by localvit.\n\n{_table(rows)}"


def _is_local(header: Mapping[str, Any]) -> bool:
    info = find_model(header["name"])
    return "localize" in header["args"] or bool(info and header["args"].get("local_blocks") != [])


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _results(about: Mapping[str, Any]) -> list[str]:
    metrics = about.get("metrics")
    if not isinstance(metrics, Mapping):
        return []
    rows = [
        (title, f"{metrics[key]:.4g}{_interval(key, metrics[key], about)}")
        for key, title in _METRICS.items()
        if isinstance(metrics.get(key), int | float)
    ]
    if isinstance(epoch := about.get("epoch"), int):
        rows.append(("epoch", str(epoch + 1)))  # files count from 0
    config = about.get("config")
    data_set = config.get("data_set") if isinstance(config, Mapping) else None
    place = f" of {data_set}" if data_set else ""
    return (
        [f"## Results\n\nOn the validation images{place}, in the run that trained it.\n\n{_table(rows)}"]
        if rows
        else []
    )


def _calibration(about: Mapping[str, Any]) -> list[str]:
    calibration = Calibration.of(about, "the checkpoint")
    if calibration is None:
        return []
    before, after = (f"{100 * error:.2f} %" for error in (calibration.ece_before, calibration.ece_after))
    return [
        f"## Calibration\n\nLogits divided by the temperature {calibration.temperature:.4g}, which was fitted to "
        f"{calibration.num_images:,} held-out images, have an expected calibration error of {after} on images that it "
        f"was not fitted to (cross-fitting); undivided, {before}. `localvit predict --calibrated` does that."
    ]


def _interval(key: str, value: float, about: Mapping[str, Any]) -> str:
    """The 95 % interval of an accuracy and the number of its images, if that is known."""
    count = about.get("test_images")
    if key not in ("test_acc1", "test_acc5") or type(count) is not int or count < 1 or not 0 <= value <= 100:
        return ""
    return f" (95 % interval {interval_text(value, count)}, {count:,} images)"


def _usage(title: str) -> str:
    return f"""\
Importing localvit tells timm and transformers how the model is built. No code is downloaded.

```python
import localvit

model = localvit.from_hub("{title}")
for prediction in localvit.predict(model, "photo.jpg"):
    print(prediction)
```

```python
import localvit, timm

model = timm.create_model("hf-hub:{title}", pretrained=True).eval()
```

```python
import localvit
from transformers import pipeline

classify = pipeline("image-classification", model="{title}")
```"""


def _classes(names: list[str] | None) -> list[str]:
    if names is None or len(names) == 1000:
        return []
    shown = ", ".join(f"`{_one_line(name)}`" for name in names[:_SHOWN_CLASSES])
    more = f", and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    return [f"## Classes\n\n{shown}{more}"]


def _training(about: Mapping[str, Any]) -> list[str]:
    config = about.get("config")
    if not isinstance(config, Mapping):
        return []
    shown = [key for key in _SETTINGS if config.get(key) not in (None, "none")]
    if "distillation" not in shown and "teacher" in shown:
        shown.remove("teacher")
    rows = [(key, f"`{_one_line(json.dumps(config[key]))}`") for key in shown]
    return [f"## Training\n\n{_table(rows)}"] if rows else []


def _one_line(text: str) -> str:
    """Text for a code span in a table: one line, without the characters that end either."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown.replace("`", "'").replace("|", "\\|")


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
