"""What augmentation does to pixels: PIL's operations, on many images at once, each with its own argument.

Each image is computed for itself, and sums are those of integers, so that its result does not depend on the others.
Results are PIL's, or differ by 1 of 255 where stated.

Shapes: B images, C = 3 channels, H and W pixels. Images are bytes (uint8), arguments float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _blended(start_BCHW: Tensor, image_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """From `start` (factor 0) to the image (factor 1) and beyond."""
    start = start_BCHW.float()
    mixed = start + factor_B[:, None, None, None] * (image_BCHW.float() - start)
    return mixed.clamp(0, 255).byte()


def _gray(image_BCHW: Tensor) -> Tensor:
    """Luma (B, 1, H, W), as int32."""
    red, green, blue = image_BCHW.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def brightness(image_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """From black (0) to the image (1) and brighter."""
    return _blended(torch.zeros_like(image_BCHW), image_BCHW, factor_B)


def contrast(image_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """From the image's mean gray (0) to the image (1) and more contrast."""
    gray_B1HW = _gray(image_BCHW)
    pixels = gray_B1HW[0].numel()
    total_B111 = gray_B1HW.sum((1, 2, 3), keepdim=True)
    return _blended((2 * total_B111 + pixels) // (2 * pixels), image_BCHW, factor_B)


def color(image_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """From gray (0) to the image (1) and more saturated."""
    return _blended(_gray(image_BCHW), image_BCHW, factor_B)


def sharpness(image_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """From a smoothed image (0) to the image (1) and sharper. The outermost pixels stay as they are."""
    if min(image_BCHW.shape[2:]) < 3:
        return image_BCHW
    wide = image_BCHW.int()
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smooth_BCHW = image_BCHW.clone()
    smooth_BCHW[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).byte()  # the sum of the weights is 13
    return _blended(smooth_BCHW, image_BCHW, factor_B)


def invert(image_BCHW: Tensor, _: Tensor) -> Tensor:
    """The negative."""
    return 255 - image_BCHW


def posterize(image_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the upper bits, 0 (black) to 8 (all), of each byte."""
    mask_B = 256 - 2 ** (8 - bits_B.int())
    return (image_BCHW.int() & mask_B[:, None, None, None]).byte()


def solarize(image_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """Invert the bytes from the threshold on."""
    return torch.where(image_BCHW < threshold_B[:, None, None, None], image_BCHW, 255 - image_BCHW)


def solarize_add(image_BCHW: Tensor, addend_B: Tensor) -> Tensor:
    """Add to the bytes below 128."""
    brighter = (image_BCHW + addend_B[:, None, None, None]).clamp(max=255).byte()
    return torch.where(image_BCHW < 128, brighter, image_BCHW)


def auto_contrast(image_BCHW: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to the whole range; may differ from PIL by 1."""
    wide = image_BCHW.int()
    low = wide.amin((2, 3), keepdim=True)
    spread = wide.amax((2, 3), keepdim=True) - low
    stretched = (wide - low) * 255 // spread.clamp(min=1)
    return torch.where(spread == 0, image_BCHW, stretched.byte())


def equalize(image_BCHW: Tensor, _: Tensor) -> Tensor:
    """Make the histogram of each channel uniform."""
    levels_RP = image_BCHW.flatten(0, 1).flatten(1).long()  # R: a row for each channel of each image, P: its pixels
    counts_RL = levels_RP.new_zeros(len(levels_RP), 256).scatter_add_(1, levels_RP, torch.ones_like(levels_RP))
    last_R1 = counts_RL.gather(1, levels_RP.amax(1, keepdim=True))
    step_R1 = (levels_RP.shape[1] - last_R1) // 255
    below_RL = counts_RL.cumsum(1) - counts_RL
    table_RL = ((step_R1 // 2 + below_RL) // step_R1.clamp(min=1)).clamp(max=255)
    equalized = torch.where(step_R1 == 0, levels_RP, table_RL.gather(1, levels_RP))
    return equalized.byte().view_as(image_BCHW)


def warp(image_BCHW: Tensor, matrix_B23: Tensor, fill_C: Tensor) -> Tensor:
    """Sample each image at affine positions, bilinearly; `fill_C` (uint8) where they are outside.

    Args:
        image_BCHW: The images.
        matrix_B23: From the position of a pixel (x, y, 1) in the result to that in the image. The center of the first
            pixel is at (0.5, 0.5). Float32, as PIL's `Image.transform` takes it.
        fill_C: The color outside.

    Returns:
        The warped images. PIL rounds down, so they may differ by 1.
    """
    height, width = image_BCHW.shape[2:]
    x_W, y_H1 = (torch.arange(side, device=image_BCHW.device) + 0.5 for side in (width, height))
    y_H1 = y_H1[:, None]
    at_x, at_y = (
        a * x_W + b * y_H1 + c for a, b, c in (row[..., None, None].unbind(1) for row in matrix_B23.unbind(1))
    )
    grid_BHW2 = torch.stack((at_x * (2 / width) - 1, at_y * (2 / height) - 1), dim=3)
    sampled = F.grid_sample(image_BCHW.float(), grid_BHW2, padding_mode="border", align_corners=False)
    is_inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
    return torch.where(is_inside[:, None], (sampled + 0.5).byte(), fill_C[:, None, None])


def crop(image_BCHW: Tensor, top_B: Tensor, left_B: Tensor, size: tuple[int, int], is_flipped_B: Tensor) -> Tensor:
    """A window of each image, black outside of it, and mirrored where `is_flipped_B`.

    Args:
        image_BCHW: The images.
        top_B, left_B: First row and column, which may be negative, int64.
        size: Height and width of the window.
        is_flipped_B: Whether to reverse the columns.
    """
    height, width = image_BCHW.shape[2:]
    row_BH = top_B[:, None] + torch.arange(size[0], device=top_B.device)
    column_W = torch.arange(size[1], device=top_B.device)
    column_BW = left_B[:, None] + torch.where(is_flipped_B[:, None], column_W.flip(0), column_W)
    is_inside = ((row_BH >= 0) & (row_BH < height))[:, :, None] & ((column_BW >= 0) & (column_BW < width))[:, None]
    place_BHW = row_BH.clamp(0, height - 1)[:, :, None] * width + column_BW.clamp(0, width - 1)[:, None]
    places = place_BHW.flatten(1)[:, None].expand(-1, image_BCHW.shape[1], -1)
    taken = image_BCHW.flatten(2).gather(2, places).unflatten(2, size)
    return taken * is_inside[:, None]
