"""Gradient-weighted class activation maps: the patches that speak for a class.

Grad-CAM (Selvaraju et al., arXiv 1610.02391, equations 1 and 2): the channels of a map of patches, weighted by the mean
gradient of the class's logit over the map, summed, and clipped at zero.

Which map: where the head averages the tokens, what the last norm returns; the result is then the class activation map
of arXiv 1512.04150 up to a factor. Where the head reads the class token, the patch tokens that leave the last block do
not change the logits and have no gradient. The map is then what the last attention reads (in pre-norm blocks, what
`norm1` of the last block returns): the last place where patches still have an effect.

Shapes: B images, M classes, C channels, H and W the grid of the last block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localvit.explanations.layers import ModelLayers, TokenLayer, layers_of
from localvit.utils.wrappers import unwrap


@dataclass(frozen=True, kw_only=True)
class ClassActivation:
    """Class activation maps of a batch."""

    map_BHW: Tensor
    """At least 0. Zero everywhere means that no patch speaks for the class at this layer."""
    logits_BM: Tensor
    """The model's output."""
    target_B: Tensor
    """The class that each map is of."""
    layer: str
    """Name of the module whose input or output the map is made of."""


def grad_cam(model: nn.Module, images_BCHW: Tensor, target: int | Sequence[int] | None = None) -> ClassActivation:
    """Class activation maps of a class, by default the one that the model predicts.

    The parameters' gradients stay as they are.

    Args:
        model: a model in evaluation mode, fused or not. A compiled one runs uncompiled.
        images_BCHW: prepared images, on the model's device.
        target: index of the class, or of one class for each image.

    Raises:
        ValueError: for a model that is not supported (see `layers_of`), and for a class that it does not have.
    """
    layers, model = layers_of(model), unwrap(model)
    tokens: list[Tensor] = []
    layer = map_layer(layers)
    with torch.inference_mode(False), torch.enable_grad():
        # Images that want a gradient give every activation one, also in a model whose weights are frozen.
        images_BCHW = images_BCHW.detach().clone().requires_grad_()
        handle = _watch(layers, layer.module, tokens)
        try:
            logits_BM = logits_of(model(images_BCHW))
        finally:
            handle.remove()
        target_B = _targets(target, logits_BM)
        score = logits_BM.gather(1, target_B[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, tokens[-1])
    size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
    map_BCHW, gradient_BCHW = (layer.to_map(each.detach(), size) for each in (tokens[-1], gradient))
    weight_BC11 = gradient_BCHW.mean((2, 3), keepdim=True)
    return ClassActivation(
        map_BHW=(weight_BC11 * map_BCHW).sum(1).relu(),
        logits_BM=logits_BM.detach(),
        target_B=target_B,
        layer=layer.name,
    )


def map_layer(layers: ModelLayers) -> TokenLayer:
    """Where the map is taken: the last norm's output, or the last attention's input if the head reads prefix tokens."""
    if not layers.reads_class_token:
        return layers.last_norm
    last = layers.outer_attentions[-1]
    return TokenLayer(name=f"input of {last.name}", module=last.module, grid=layers.blocks[-1].grid)


def logits_of(output: Any) -> Tensor:
    """The logits (B, M) in what a model returns. Raises ValueError if there are none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError("the model returns no logits (B, classes): a class needs a model with a classification head")
    return logits


def _watch(layers: ModelLayers, module: nn.Module, tokens: list[Tensor]) -> Any:
    """Collect the input or the output of the layer. Returns the hook's handle."""
    if not layers.reads_class_token:
        return module.register_forward_hook(lambda _module, _args, output: tokens.append(output))

    def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens.append(args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(keep, with_kwargs=True)


def _targets(target: int | Sequence[int] | None, logits_BM: Tensor) -> Tensor:
    batch, num_classes = logits_BM.shape
    if target is None:
        return logits_BM.detach().argmax(1)
    targets = one_for_each(target, batch)
    if wrong := [each for each in targets if not 0 <= each < num_classes]:
        raise ValueError(f"target class {wrong[0]} does not exist: the model has classes 0 to {num_classes - 1}")
    return torch.tensor(targets, device=logits_BM.device)


def one_for_each(target: int | Sequence[int], num_images: int) -> list[int]:
    """The class of each image, given one for all or one for each, also as an array or a tensor.

    Raises ValueError for another number of classes, and for what is not an integer.
    """
    try:
        targets = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        targets = None
    if targets is None or targets.ndim > 1 or targets.dtype == torch.bool or targets.is_floating_point():
        raise ValueError(f"target={target!r} is neither the index of a class nor one index for each image")
    if targets.ndim == 0:
        targets = targets.expand(num_images)
    if len(targets) != num_images:
        raise ValueError(
            f"{len(targets)} target classes were given for {num_images} images: give one for each, or a single one"
        )
    return targets.tolist()
