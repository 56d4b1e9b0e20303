"""Heat maps drawn over images."""

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from localvit.data.images import Images
from localvit.data.split import ImageSubset
from localvit.explanations.explain import Explanation, explain
from localvit.inference.runner import InferenceOptions, ModelSource

SMALLEST_SIDE = 224
"""Smaller images are enlarged by a whole factor, without smoothing, until their shorter side has this many pixels."""
PANEL = 168
"""Longest side of one layer in the sheet of all layers."""
GAP = 6
CAPTION = 18
OPACITY = 0.75
"""Of the color at the highest value; none at the lowest."""

# Dark violet, red, orange, light yellow: lightness grows steadily, so that it also reads in gray.
_ANCHORS = ((20, 11, 53), (87, 15, 109), (151, 38, 102), (208, 68, 70), (243, 120, 25), (252, 187, 40), (250, 245, 160))


def colors(values: np.ndarray) -> np.ndarray:
    """Colors (..., 3) of values from 0 to 1, as bytes."""
    steps = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(values, steps, [anchor[channel] for anchor in _ANCHORS]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def draw_overlay(image: Image.Image, heat_HW: Tensor, *, smallest_side: int = SMALLEST_SIDE) -> Image.Image:
    """A heat map over a grayscale copy of its image. The highest value gets the lightest color.

    A map of zeros only leaves the image gray.
    """
    image = enlarge(image, smallest_side)
    heat = heat_HW.double().numpy()
    heat = heat / heat.max() if heat.max() > 0 else heat
    resized = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    strength = np.asarray(resized).clip(0, 1)
    gray = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    opacity = OPACITY * np.sqrt(strength)[..., None] if heat.max() > 0 else 0.0
    return Image.fromarray((gray * (1 - opacity) + colors(strength) * opacity).round().astype(np.uint8))


def enlarge(image: Image.Image, smallest_side: int = SMALLEST_SIDE) -> Image.Image:
    """The image, enlarged by a whole factor if its shorter side is below `smallest_side`."""
    factor = max(1, -(-smallest_side // min(image.size)))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def draw_explanation(explanation: Explanation) -> Image.Image:
    """The image and its map side by side, or all layers on one sheet.

    Raises ValueError for an explanation that has an error instead.
    """
    if explanation.image is None:
        raise ValueError(f"{explanation.file} has no explanation: {explanation.error}")
    if len(explanation.maps) == 1:
        left, right = enlarge(explanation.image), draw_overlay(explanation.image, explanation.maps[0].values_HW)
        return _sheet([left, right], ["", ""], columns=2)
    panels = [_fit(enlarge(explanation.image, PANEL))]
    panels += [_fit(draw_overlay(explanation.image, each.values_HW, smallest_side=PANEL)) for each in explanation.maps]
    names = ["image", *(short_name(each.name) for each in explanation.maps)]
    return _sheet(panels, names, columns=min(len(panels), 7 if len(panels) % 7 == 0 or len(panels) > 14 else 5))


def class_overlays(
    model: ModelSource,
    images: Images,
    classes: Mapping[int, Sequence[int]],
    options: InferenceOptions | None = None,
) -> dict[int, list[Image.Image]]:
    """Some images of a data set as the model sees them, and class activation maps drawn over them, for a report.

    Args:
        model, options: as in `localvit.explain`.
        images: the data set.
        classes: for the index of each of its images to explain, the classes to draw maps of: equally many for each.

    Returns:
        For each index, the image and the map of each class; an image that cannot be read is left out.

    Raises:
        ValueError: as `localvit.explain`, and if the numbers of classes differ.
    """
    chosen = ImageSubset(images, list(classes))
    drawn: dict[int, list[Image.Image]] = {}
    for targets in zip(*classes.values(), strict=True):
        for index, each in zip(classes, explain(model, chosen, "cam", target=targets, options=options), strict=True):
            if each.image is not None:
                overlay = draw_overlay(each.image, each.maps[0].values_HW)
                drawn.setdefault(index, [enlarge(each.image)]).append(overlay)
    return drawn


def short_name(layer: str) -> str:
    """`blocks.3.attn` as "block 4", `stages.1.blocks.0.attn` as "stage 2 block 1", `attn_in` and `attn_out` kept."""
    parts = layer.split(".")
    words: list[str] = []
    for name, number in pairwise(parts):
        if number.isdigit():
            words.append(f"{_SINGULAR.get(name, name)} {int(number) + 1}")
    kind = {"attn_in": "inner", "attn_out": "outer"}.get(parts[-1])
    return " ".join([*words, kind] if kind else words) or layer


_SINGULAR = {"blocks": "block", "stages": "stage", "layers": "stage", "layer": "block", "attns": "attention"}


def _fit(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((PANEL, PANEL), Image.Resampling.LANCZOS)
    return image


def _sheet(panels: Sequence[Image.Image], names: Sequence[str], columns: int) -> Image.Image:
    width, height = panels[0].size
    caption = CAPTION if any(names) else 0
    rows = -(-len(panels) // columns)
    size = (columns * (width + GAP) - GAP, rows * (height + caption + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (panel, name) in enumerate(zip(panels, names, strict=True)):
        left, top = number % columns * (width + GAP), number // columns * (height + caption + GAP)
        if caption:
            draw.text((left + 1, top + 1), name, fill="black", font=font)
        sheet.paste(panel, (left, top + caption))
    return sheet


def as_data_url(image: Image.Image) -> str:
    """The image as a JPEG in a data: URL."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
