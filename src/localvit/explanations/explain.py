"""Explain what a model looks at in images: heat maps on each image as evaluation crops it.

Shapes: B images, M classes, H and W a grid of patches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from localvit.data.classes import readable_class_names
from localvit.data.folders import PathImages
from localvit.data.images import ImageSequence
from localvit.data.preprocessing import Preprocessing, WholeImages
from localvit.explanations import hosts  # noqa: F401  (registers the rules)
from localvit.explanations.attention import AttentionMap, output_and_maps
from localvit.explanations.cam import grad_cam, logits_of, one_for_each
from localvit.explanations.layers import ModelLayers, layers_of
from localvit.explanations.rollout import rollout_of_maps
from localvit.inference.runner import InferenceOptions, ModelSource, Runner

Method = Literal["attention", "rollout", "cam"]
"""Attention of each layer, rollout through all layers, or the class activation map."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One map of an image."""

    name: str
    """The layer it is of."""
    values_HW: Tensor
    """At least 0, on the grid of the layer, float32 on the CPU: shares that sum to at most 1 for attention and rollout,
    any scale for a class activation map."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a model looks at in one image, or why there is no explanation."""

    file: str
    """Path of the image, or its position in a data set or batch."""
    method: Method
    maps: tuple[HeatMap, ...] = ()
    """One for each layer for "attention", otherwise a single one."""
    image: Image.Image | None = None
    """The image as the model sees it: resized and cropped as for evaluation."""
    predicted: str = ""
    """Name of the predicted class."""
    probability: float = 0.0
    """Its softmax probability, from 0 to 1."""
    target: str | None = None
    """Name of the class that a class activation map is of; None for the other methods, which know no class."""
    target_probability: float | None = None
    """Its softmax probability."""
    error: str | None = None
    """Why there is no explanation: the image is unreadable, or the model's output for it is not finite."""

    def __str__(self) -> str:
        if self.error:
            return f"{self.file}: {self.error}"
        target = "" if self.target in (None, self.predicted) else f", shown {self.target}"
        return f"{self.file}: {self.predicted} {100 * self.probability:.1f} %{target}"


def explain(
    model: ModelSource,
    images: str | Path | Iterable[str | Path] | ImageSequence | Tensor,
    method: Method = "cam",
    *,
    target: int | str | Sequence[int] | None = None,
    preprocessing: Preprocessing | None = None,
    options: InferenceOptions | None = None,
    class_names: Iterable[str] | None = None,
) -> Iterator[Explanation]:
    """Explain what a model looks at in each image, in the order of the images.

    Args:
        model: as in `localvit.predict`; exported files, whose layers cannot be read, are refused.
        images: a file, folder or glob pattern, several of them, any `ImageSequence`, or prepared images (B, C, H, W).
        method: "attention": for each layer the attention, averaged over heads, from the class token to the patches or,
            in layers without one, from all tokens. "rollout": `localvit.explanations.rollout`. "cam": `grad_cam`.
        target: the class of a class activation map, as index or name, or one index for each image; by default the
            predicted class.
        preprocessing: as in `localvit.predict`.
        options: as in `localvit.predict`.
        class_names: as in `localvit.predict`.

    Yields:
        An `Explanation` for each image. An unreadable image has an error instead of maps.

    Raises:
        DataError: no path leads to an image.
        ValueError: for an unknown method or class, a target for a method other than "cam", a tensor that is not a
            prepared batch, a model that is not supported, and as `localvit.predict`.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(get_args(Method))}")
    if target is not None and method != "cam":
        raise ValueError(f"method={method!r} does not depend on a class: leave out target, or choose method='cam'")
    runner = Runner.of(model, preprocessing, options, None if class_names is None else list(class_names))
    layers = layers_of(runner.model)
    if isinstance(images, Tensor) and (images.ndim != 4 or not images.is_floating_point()):
        raise ValueError(
            f"images of shape {tuple(images.shape)} and dtype {images.dtype} must be a prepared batch (B, C, H, W): "
            "floating point numbers, normalized as for the model"
        )
    if not isinstance(images, Tensor | ImageSequence):
        images = PathImages(images)
    targets = _targets(target, images, runner.class_names)
    if isinstance(images, Tensor):
        return _of_tensor(runner, layers, images, method, targets)
    return _of_images(runner, layers, images, method, targets)


Targets = Sequence[int] | None
"""The class of each image, or None for the predicted ones."""


def _targets(
    target: int | str | Sequence[int] | None, images: ImageSequence | Tensor, class_names: list[str] | None
) -> Targets:
    if isinstance(target, str):
        target = class_index(target, class_names)
    return None if target is None else one_for_each(target, len(images))


def class_index(target: int | str | None, class_names: list[str] | None) -> int | None:
    """The index of a class given by index, name or, for ImageNet, words. Raises ValueError if there is none."""
    if target is None or isinstance(target, int):
        return target
    names = class_names or []
    for known in (names, readable_class_names(names, len(names)) if names else []):
        if target in known:
            return known.index(target)
    if target.isdigit():
        return int(target)
    some = ", ".join(names[:5])
    raise ValueError(
        f"target {target!r} is not a class of the model; its classes are {some}{', ...' * (len(names) > 5)}"
        if names
        else f"target {target!r} is not a number, and the model has no class names"
    )


def _of_images(
    runner: Runner, layers: ModelLayers, images: ImageSequence, method: Method, targets: Targets
) -> Iterator[Explanation]:
    for indices, images_BCHW, failed in runner.load_batches(images, range(len(images))):
        done = {}
        for index, reason in failed:
            file = images.name(index)
            done[index] = Explanation(file=file, method=method, error=reason.removeprefix(f"{file}: "))
        if images_BCHW is not None:
            names = [images.name(index) for index in indices]
            target = None if targets is None else [targets[index] for index in indices]
            done |= dict(zip(indices, _explain_batch(runner, layers, images_BCHW, names, method, target), strict=True))
        for index in sorted(done):
            yield done[index]


def _of_tensor(
    runner: Runner, layers: ModelLayers, images_BCHW: Tensor, method: Method, targets: Targets
) -> Iterator[Explanation]:
    size = runner.options.images_per_batch
    for start in range(0, len(images_BCHW), size):
        part_BCHW = images_BCHW[start : start + size]
        names = [str(start + number) for number in range(len(part_BCHW))]
        target = None if targets is None else targets[start : start + size]
        yield from _explain_batch(runner, layers, part_BCHW, names, method, target)


def _explain_batch(
    runner: Runner, layers: ModelLayers, images_BCHW: Tensor, names: list[str], method: Method, target: Targets
) -> list[Explanation]:
    inputs_BCHW = images_BCHW.to(runner.options.device)
    with runner.options.autocast():
        logits_BM, target_B, maps = _MAPS[method](runner.model, layers, inputs_BCHW, target)
    probabilities_BM = logits_BM.double().softmax(1).cpu()
    classes = readable_class_names(runner.class_names, probabilities_BM.shape[1])
    explanations = []
    for index, (name, probabilities_M) in enumerate(zip(names, probabilities_BM, strict=True)):
        if not probabilities_M.isfinite().all():
            explanations.append(Explanation(file=name, method=method, error="the model's output is not finite"))
            continue
        best = int(probabilities_M.argmax())
        shown = None if target_B is None else int(target_B[index])
        explanations.append(
            Explanation(
                file=name,
                method=method,
                maps=tuple(HeatMap(name=layer, values_HW=heat_BHW[index].float().cpu()) for layer, heat_BHW in maps),
                image=shown_image(images_BCHW[index], runner.preprocessing),
                predicted=classes[best],
                probability=float(probabilities_M[best]),
                target=None if shown is None else classes[shown],
                target_probability=None if shown is None else float(probabilities_M[shown]),
            )
        )
    return explanations


Maps = tuple[Tensor, Tensor | None, list[tuple[str, Tensor]]]
"""Logits (B, M), the class of each map or None, and name and maps (B, H, W) of each layer."""


@torch.no_grad()
def _attention(model: nn.Module, layers: ModelLayers, images_BCHW: Tensor, target: None) -> Maps:
    output, maps = output_and_maps(model, layers, images_BCHW)
    return logits_of(output), None, [(each.layer, received(each, layers.num_tokens_read)) for each in maps]


@torch.no_grad()
def _rollout(model: nn.Module, layers: ModelLayers, images_BCHW: Tensor, target: None) -> Maps:
    output, maps = output_and_maps(model, layers, images_BCHW)
    return logits_of(output), None, [("all layers", rollout_of_maps(maps, layers.num_tokens_read))]


def _cam(model: nn.Module, layers: ModelLayers, images_BCHW: Tensor, target: Targets) -> Maps:
    found = grad_cam(model, images_BCHW, target)
    return found.logits_BM, found.target_B, [(found.layer, found.map_BHW)]


_MAPS: dict[Method, Callable[..., Maps]] = {"attention": _attention, "rollout": _rollout, "cam": _cam}


def received(attention: AttentionMap, num_class_tokens: int) -> Tensor:
    """The attention (B, h, w) that each patch receives, averaged over heads and over the tokens that attend.

    Those are the class tokens that the head reads where the layer has them, otherwise all tokens.
    """
    query, key = attention.placement.query, attention.placement.key
    share_BN = attention.weights_BWMQK.new_zeros(len(attention.weights_BWMQK), len(query))
    share_BN[:, : num_class_tokens if 0 < num_class_tokens <= query.num_prefix_tokens else None] = 1
    keys_BN = attention.spread(share_BN / share_BN.sum(1, keepdim=True))
    return keys_BN[:, key.num_prefix_tokens :].unflatten(1, key.size)


def shown_image(image_CHW: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """A prepared image as an image of bytes again, as the model sees it."""
    pixels = image_CHW.detach().cpu().float()
    if not isinstance(preprocessing, WholeImages):
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
        pixels = (pixels * std + mean) * 255
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
