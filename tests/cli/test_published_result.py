"""The published number is shown beside a result on the whole published set, and beside no other."""

from dataclasses import replace

import torch

from localvit.data.classes import imagenet_synsets
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.evaluate import Evaluation
from localvit.inference.runner import LoadedModel
from localvit.models.registry import find_model
from localvit_cli.published_result import published_line


def result(hits, count, class_names):
    """An evaluation in which the first `hits` images are right."""
    labels_N = torch.zeros(count, dtype=torch.int64)
    top_N1 = (torch.arange(count) >= hits).long()[:, None]
    return Evaluation(
        paths=[""] * count,
        labels_N=labels_N,
        top_classes_NK=top_N1,
        top_logits_NK=torch.zeros(count, 1),
        top_probabilities_NK=torch.full((count, 1), 0.5, dtype=torch.float64),
        losses_N=torch.ones(count, dtype=torch.float64),
        class_names=list(class_names),
    )


def loaded(name, size):
    return LoadedModel(
        model=torch.nn.Identity(),
        name=name,
        class_names=None,
        preprocessing=Preprocessing.published((size, size)),
        description="",
    )


def test_released_weights_on_imagenet_val():
    model, full = loaded("localvit_tiny_mlp4_act3_r192", 224), result(37_424, 50_000, imagenet_synsets())
    line = published_line(model, full, "IMNET")
    # 37,424 of 50,000 images are 74.848 %; published are 74.838 and 92.610 (README of the release).
    assert line == (
        "published for LocalViT-T: Acc@1 74.838 Acc@5 92.610 loss 1.211; this result differs by +0.010 and -17.762"
    )
    assert published_line(model, result(3, 49_999, imagenet_synsets()), "IMNET") is None
    assert published_line(model, full, "FOLDER") is None
    assert published_line(model, replace(full, skipped=["x"]), "IMNET") is None
    assert published_line(loaded("localvit_tiny_mlp4_act3_r192", 256), full, "IMNET") is None
    assert published_line(replace(model, weights="ema"), full, "IMNET") is None
    assert published_line(loaded("deit_tiny_patch16_224", 224), full, "IMNET") is None


def test_packaged_weights_on_their_test_images():
    packaged = find_model("localvit_nano_patch4_32").packaged
    model = loaded("localvit_nano_patch4_32", 32)
    full = result(8_000, packaged.num_images, packaged.class_names)
    line = published_line(model, full, "FOLDER")
    assert line.startswith(f"published for localvit_nano_patch4_32.cifar10: Acc@1 {packaged.acc1:.3f} ")
    assert f"differs by {80 - packaged.acc1:+.3f}" in line
    assert published_line(model, result(8_000, 9_999, packaged.class_names), "FOLDER") is None
