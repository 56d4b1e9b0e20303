"""How far attention reaches, and how far the input of a layer's output does.

Shapes: B images, M heads, W windows, Q queries and K keys of a window, C channels, H and W an image in pixels, or a
grid of patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localvit.explanations.attention import AttentionMap
from localvit.explanations.layers import Size, TokenGrid, layers_of
from localvit.utils.wrappers import unwrap


def attention_distance(attention: AttentionMap, image_size: Size) -> Tensor:
    """The mean distance (B, M), in pixels of the image, between a patch and the patches that it attends to.

    Distances between the centers of patches, weighted by the attention (Dosovitskiy et al., arXiv 2010.11929,
    section 4.5). Prefix tokens and padding are left out, on both sides.
    """
    placement, weights = attention.placement, attention.weights_BWMQK
    distance_WQK, counts_WQK = _distances(
        placement.query, placement.key, placement.query_index_WQ, placement.key_index_WK, image_size
    )
    distance_WQK, counts_WQK = distance_WQK.to(weights), counts_WQK.to(weights)
    total_BWMQ = torch.einsum("bwmqk,wqk->bwmq", weights, counts_WQK)
    mean_BWMQ = torch.einsum("bwmqk,wqk->bwmq", weights, distance_WQK) / total_BWMQ.clamp(min=1e-12)
    is_patch_W1Q = counts_WQK.any(-1)[:, None].to(weights)
    return (mean_BWMQ * is_patch_W1Q).sum((1, 3)) / is_patch_W1Q.sum()


def uniform_distance(attention: AttentionMap, image_size: Size) -> float:
    """`attention_distance` if each patch attended to all patches of its window equally."""
    placement = attention.placement
    distance_WQK, counts_WQK = _distances(
        placement.query, placement.key, placement.query_index_WQ, placement.key_index_WK, image_size
    )
    total_WQ = counts_WQK.sum(-1)
    return float((distance_WQK.sum(-1) / total_WQ.clamp(min=1))[total_WQ > 0].mean())


def _distances(
    query: TokenGrid, key: TokenGrid, query_index_WQ: Tensor, key_index_WK: Tensor, image_size: Size
) -> tuple[Tensor, Tensor]:
    """The distance of each pair of patches, and 1 for such pairs; 0 in both for other tokens."""
    query_WQ2, key_WK2 = _centers(query, query_index_WQ, image_size), _centers(key, key_index_WK, image_size)
    distance_WQK = (query_WQ2[:, :, None] - key_WK2[:, None]).square().sum(-1).sqrt()
    counts = (query_index_WQ >= query.num_prefix_tokens)[:, :, None] & (key_index_WK >= key.num_prefix_tokens)[:, None]
    return distance_WQK * counts, counts.to(distance_WQK)


def _centers(grid: TokenGrid, index: Tensor, image_size: Size) -> Tensor:
    """Row and column, in pixels, of the centers of patches given by their position in the sequence."""
    patch = (index - grid.num_prefix_tokens).clamp(min=0)
    row, column = patch // grid.size[1], patch % grid.size[1]
    return torch.stack(
        ((row + 0.5) * image_size[0] / grid.size[0], (column + 0.5) * image_size[1] / grid.size[1]), dim=-1
    )


def receptive_fields(model: nn.Module, images_BCHW: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """The squared gradient (H, W) of each block's output at the center patch, with respect to each pixel.

    The effective receptive field (Luo et al., arXiv 1701.04128): mean over images, sum over channels of the image. The
    gradient is that of a random sum of the output's channels, with signs of equal probability, so that its square is an
    unbiased estimate of the sum of squares of all channels' gradients.

    Args:
        model: a model in evaluation mode, fused or not.
        images_BCHW: prepared images, on the model's device.
        seed: of the random signs.

    Raises:
        ValueError: for a model that is not supported (see `layers_of`).
    """
    layers, model = layers_of(model), unwrap(model)
    outputs: dict[str, Tensor] = {}
    size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        images_BCHW = images_BCHW.detach().clone().requires_grad_()
        handles = [
            block.module.register_forward_hook(
                lambda _module, _args, output, block=block: outputs.__setitem__(block.name, block.to_map(output, size))
            )
            for block in layers.blocks
        ]
        try:
            model(images_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        fields = {}
        for name, map_BCHW in outputs.items():
            center_BC = map_BCHW[:, :, map_BCHW.shape[2] // 2, map_BCHW.shape[3] // 2]
            sign_BC = torch.randint(0, 2, center_BC.shape, generator=generator).to(center_BC) * 2 - 1
            (gradient,) = torch.autograd.grad((center_BC * sign_BC).sum(), images_BCHW, retain_graph=True)
            fields[name] = gradient.square().sum(1).mean(0)
    return fields


def field_distance(field_HW: Tensor, center: tuple[float, float]) -> float:
    """The mean distance, in pixels, from the center (row, column) of a field, weighted by the size of the gradient."""
    weight_HW = field_HW.double().sqrt()
    rows = torch.arange(field_HW.shape[0], dtype=torch.float64) + 0.5 - center[0]
    columns = torch.arange(field_HW.shape[1], dtype=torch.float64) + 0.5 - center[1]
    distance_HW = (rows[:, None].square() + columns[None].square()).sqrt()
    return float((weight_HW.cpu() * distance_HW).sum() / weight_HW.cpu().sum())


def center_of(grid: Size, image_size: Size) -> tuple[float, float]:
    """Row and column, in pixels, of the middle of the center patch."""
    return (grid[0] // 2 + 0.5) * image_size[0] / grid[0], (grid[1] // 2 + 0.5) * image_size[1] / grid[1]


def share_nearby(field_HW: Tensor, grid: Size, patches: int) -> float:
    """The share of the squared gradient within so many patches of the center patch, in both directions."""
    height, width = field_HW.shape[0] / grid[0], field_HW.shape[1] / grid[1]
    rows, columns = (
        slice(max(0, round((side // 2 - patches) * unit)), round((side // 2 + 1 + patches) * unit))
        for side, unit in ((grid[0], height), (grid[1], width))
    )
    return float(field_HW[rows, columns].double().sum() / field_HW.double().sum())


def mean_field(fields: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The mean of fields of batches, given the number of images in each."""
    return torch.stack([field * count for field, count in zip(fields, counts, strict=True)]).sum(0) / sum(counts)
