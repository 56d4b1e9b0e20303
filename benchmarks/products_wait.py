"""Are products of computed operands right without waiting for each, and what does waiting cost?

    python benchmarks/products_wait.py [--draws 12]

Needs an NVIDIA GPU of compute capability 9. `localvit.ops.triton.rows.overwrites_operands` says why a kernel waits.
Here each runs both ways, on fresh random tensors, beside the product in float32. A draw is wrong if a value is off by
more than 2 % of the largest, where the rounding of operands and results to bfloat16 makes about 0.5 %.

Shapes: B batch, H and W the grid, C channels outside, E hidden channels.
"""

import argparse
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from localvit.ops.triton import pointwise, pointwise_backward

SIZES = [(191, 7, 192, 768), (256, 14, 192, 768), (64, 14, 384, 1536), (64, 28, 128, 1024), (37, 14, 96, 384)]
"""Batch, height and width, and channels outside and inside the module."""
WRONG = 0.02


def products(batch: int, side: int, channels: int, hidden: int) -> Iterator[tuple[str, Callable[[], Tensor], Tensor]]:
    """Name, call and wanted result of each kernel whose left operand is computed."""

    def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    def rounded(operand: Tensor) -> Tensor:
        return operand.bfloat16().float()

    z_BHWE, weight_CE, weight_EC = values(batch, side, side, hidden), values(channels, hidden), values(hidden, channels)
    norm_4E, slopes_3E = values(4, hidden, dtype=torch.float32), values(3, hidden, dtype=torch.float32)
    gate_BE, rows_BSE, grad_BHWE = values(batch, hidden), z_BHWE.flatten(1, 2), values(*z_BHWE.shape)
    act_BSE = F.hardswish(rows_BSE.float() * norm_4E[2] + norm_4E[3])
    gated_BSE = act_BSE * gate_BE.float()[:, None]
    grad_z_BHWE = slopes_3E[0] * grad_BHWE.float() + slopes_3E[1] * (z_BHWE.float() - norm_4E[0]) + slopes_3E[2]
    yield (
        "training, projection without gate",
        lambda: pointwise.normalized_pointwise(rows_BSE, weight_CE, norm_4E, "hs", None),
        rounded(act_BSE) @ weight_CE.float().t(),
    )
    yield (
        "training, projection",
        lambda: pointwise.normalized_pointwise(rows_BSE, weight_CE, norm_4E, "hs", gate_BE),
        rounded(gated_BSE) @ weight_CE.float().t(),
    )
    yield (
        "inference, projection",
        lambda: pointwise.pointwise(rows_BSE, weight_CE, None, None, gate_BE),
        rounded(rows_BSE.float() * gate_BE.float()[:, None]) @ weight_CE.float().t(),
    )
    yield (
        "training, gradients of expansion",
        lambda: pointwise_backward.expansion_gradients(
            *(grad_BHWE, z_BHWE, norm_4E, slopes_3E, weight_EC, torch.float32)
        )[0],
        rounded(grad_z_BHWE) @ weight_EC.float(),
    )


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=12)
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("this needs a GPU of compute capability 9")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    print("| kernel | sizes | waits | wrong draws | wrong values | ms |\n|---|---|---|---|---|---|")
    for waits in (False, True):
        pointwise.launch_for.cache_clear()
        pointwise_backward._expansion_launch.cache_clear()
        with (
            mock.patch.object(pointwise, "overwrites_operands", lambda device, waits=waits: waits),
            mock.patch.object(pointwise_backward, "overwrites_operands", lambda device, waits=waits: waits),
        ):
            for sizes in SIZES:
                measure(sizes, waits, args.draws)


def measure(sizes: tuple[int, int, int, int], waits: bool, draws: int) -> None:
    """Print a row for each kernel."""
    wrong_draws: dict[str, int] = {}
    wrong_values: dict[str, int] = {}
    milliseconds: dict[str, float] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        for name, call, wanted in products(*sizes):
            difference = (call().float().view(wanted.shape) - wanted).abs()
            wrong = int((difference > WRONG * wanted.abs().amax()).sum())
            wrong_draws[name] = wrong_draws.get(name, 0) + (wrong > 0)
            wrong_values[name] = wrong_values.get(name, 0) + wrong
            if seed == draws - 1:
                milliseconds[name] = do_bench(call, warmup=10, rep=40, return_mode="median")
    for name, count in wrong_draws.items():
        cells = [name, " x ".join(map(str, sizes)), "yes" if waits else "no", f"{count} of {draws}"]
        cells += [f"{wrong_values[name]:,}", f"{milliseconds[name]:.4f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
