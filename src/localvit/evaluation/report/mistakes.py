"""The misclassified images of a report: which are listed, and what is shown of each."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from localvit.data.images import open_image
from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.metrics import correct_images

MAX_IMAGES = 24
"""Images in the list."""
THUMBNAIL = 96
"""Longest side of a thumbnail in pixels."""
MAP_SIDE = 168
"""Longest side of an image beside its maps, which keeps the page below about 1 MB."""


@dataclass(frozen=True, kw_only=True)
class ExplainedImage:
    """What the model looks at in a misclassified image."""

    image: Image.Image
    """The image as the model sees it."""
    true_map: Image.Image
    """The class activation map of the true class, drawn over the image."""
    predicted_map: Image.Image
    """That of the predicted class."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A misclassified image."""

    path: str
    true: str
    true_probability: float
    predicted: str
    confidence: float
    image: str
    """A data: URL, or the reason why there is no image."""
    maps: tuple[str, str] | None
    """Data: URLs of the maps of the true and of the predicted class, if the mistakes are explained."""


def worst_mistakes(evaluation: Evaluation) -> list[int]:
    """Positions of the misclassified images with the highest losses, at most `MAX_IMAGES`.

    Those whose loss is NaN have no rank and are left out.
    """
    loss_N = evaluation.losses_N
    wrong_N = ~correct_images(evaluation) & ~loss_N.isnan()
    order_N = loss_N.where(wrong_N, -math.inf).argsort(descending=True, stable=True)
    return order_N[: min(int(wrong_N.sum()), MAX_IMAGES)].tolist()


def list_mistakes(
    evaluation: Evaluation, dataset_root: Path | None, explained: Mapping[int, ExplainedImage]
) -> list[Mistake]:
    """The worst mistakes with their images.

    Args:
        evaluation: The evaluation.
        dataset_root: Folder of the images, for thumbnails, or None.
        explained: What the model looks at in the image at a position of the evaluation; shown instead of a thumbnail.
    """
    names = evaluation.class_names
    mistakes = []
    for index in worst_mistakes(evaluation):
        found = explained.get(index)
        path = evaluation.paths[index]
        mistakes.append(
            Mistake(
                path=path,
                true=names[evaluation.labels_N[index]],
                true_probability=math.exp(-evaluation.losses_N[index].item()),
                predicted=names[evaluation.top_classes_NK[index, 0]],
                confidence=evaluation.top_probabilities_NK[index, 0].item(),
                image=_jpeg(found.image, MAP_SIDE) if found else _thumbnail(path, dataset_root),
                maps=(_jpeg(found.true_map, MAP_SIDE), _jpeg(found.predicted_map, MAP_SIDE)) if found else None,
            )
        )
    return mistakes


def _thumbnail(path: str, dataset_root: Path | None) -> str:
    """A small JPEG as a data: URL, or the reason why there is none."""
    if dataset_root is None:
        return "no thumbnail: the data set is not a folder"
    try:
        return _jpeg(open_image(dataset_root / path), THUMBNAIL)
    except FileNotFoundError:
        return "image not found"
    except Exception as error:  # decoders raise many types, and the page needs no thumbnail
        return f"image not readable ({type(error).__name__})"


def _jpeg(image: Image.Image, side: int) -> str:
    jpeg = io.BytesIO()
    image = image.copy()
    image.thumbnail((side, side))
    image.save(jpeg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
