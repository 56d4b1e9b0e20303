"""The published number beside that of an evaluation on the same images."""

from localvit.data.classes import imagenet_synsets
from localvit.evaluation.evaluate import Evaluation
from localvit.inference.runner import LoadedModel
from localvit.models.packaged import PackagedWeights
from localvit.models.registry import ModelInfo, find_model

IMAGENET_VAL = 50_000
"""Images of the ImageNet-1k validation set."""


def published_line(loaded: LoadedModel, evaluation: Evaluation, data_set: str) -> str | None:
    """The published accuracy of an architecture, and the difference from it; None if other images were evaluated.

    Args:
        loaded: The model.
        evaluation: Its result. Only that on the whole set of the published one is compared: the ImageNet-1k validation
            set, or for weights in this package the test set of their data.
        data_set: The name of the data set.
    """
    info = find_model(loaded.name)
    if info is None or evaluation.skipped or loaded.weights != "raw":
        return None
    if loaded.preprocessing.input_size != info.input_size[1:]:
        return None
    count = len(evaluation.paths)
    published: ModelInfo | PackagedWeights | None = None
    if data_set == "IMNET" and count == IMAGENET_VAL and evaluation.class_names == imagenet_synsets():
        published, name = info, info.paper_name
    packaged = info.packaged
    if packaged and count == packaged.num_images and evaluation.class_names == list(packaged.class_names):
        published, name = packaged, f"{info.name}.{packaged.tag}"
    if published is None or published.acc1 is None or published.acc5 is None:
        return None
    differences = evaluation.acc1 - published.acc1, evaluation.acc5 - published.acc5
    return (
        f"published for {name}: Acc@1 {published.acc1:.3f} Acc@5 {published.acc5:.3f} loss {published.loss:.3f}; this "
        f"result differs by {differences[0]:+.3f} and {differences[1]:+.3f}"
    )
