"""What do the CPU's training kernels (`localvit.ops.cpu_kernels`) save, beside the recomputing path and the baselines?

    python benchmarks/cpu_training_speed.py [--rounds 15] [--batch-size 8] [--models]

Measures a training step (forward and backward, float32, one thread) of one feed-forward of each family: by the layers'
recomputing path, by the kernels, and the baseline's feed-forward (linear, GELU, linear), on random maps. With --models
also of LocalViT-T and DeiT-T as a whole. The three run in turn; times are the process's own, since other processes
slow down the others, and ratios are taken within rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn

import localvit
from localvit import ops
from localvit.locality import LocalityFeedForward
from localvit_cli.allocator import keep_freed_memory

FEED_FORWARDS = {
    "LocalViT-T": (192, 768, 14, 1),
    "LocalViT-S": (384, 1536, 14, 1),
    "LocalViT-PVT, first stage": (64, 512, 56, 1),
    "LocalViT-PVT, last stage": (512, 2048, 7, 2),
    "LocalViT-Swin, first stage": (96, 384, 56, 1),
    "LocalViT-Swin, last stage": (768, 3072, 7, 2),
    "LocalViT-TNT, inner": (24, 96, 4, 196),
}
"""Channels outside and hidden, the side of the grid, and the maps of an image (or images, where they are small)."""
WARM_UP_ROUNDS = 2

Step = Callable[[], None]


def step_of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Step:
    """Forward and backward pass; gradients are dropped."""

    def step() -> None:
        loss(model(x)).backward()
        model.zero_grad()
        x.grad = None

    return step


def recomputing(step: Step) -> Step:
    """The same step without the kernels."""

    def without_kernels() -> None:
        with ops.use_backend("torch"):
            step()

    return without_kernels


def feed_forwards(name: str, batch_size: int) -> dict[str, Step]:
    """A step of a family's feed-forward by each path, and of its baseline's."""
    channels, hidden, side, maps = FEED_FORWARDS[name]
    module = LocalityFeedForward(channels, channels, act="hs+se", expand_ratio=hidden / channels).train()
    batch = maps * batch_size
    map_BCHW = torch.randn(batch, side, side, channels).permute(0, 3, 1, 2).requires_grad_()
    tokens_BNC = torch.randn(batch, side**2, channels, requires_grad=True)
    step = step_of(module, map_BCHW, torch.sum)
    baseline = step_of(Mlp(channels, hidden).train(), tokens_BNC, torch.sum)
    return {"recomputing": recomputing(step), "kernels": step, "baseline": baseline}


def models(batch_size: int) -> dict[str, Step]:
    """A step of LocalViT-T by each path, and of DeiT-T."""
    images_BCHW = torch.randn(batch_size, 3, 224, 224)
    targets = torch.randint(1000, (batch_size,))

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets)

    step = step_of(localvit.create_model("localvit_tiny").train(), images_BCHW, loss)
    baseline = step_of(timm.create_model("deit_tiny_patch16_224").train(), images_BCHW, loss)
    return {"recomputing": recomputing(step), "kernels": step, "baseline": baseline}


def measure(name: str, steps: dict[str, Step], rounds: int) -> None:
    """Print a row of the table: median times in ms, and median ratios within rounds."""
    times: dict[str, list[float]] = {each: [] for each in steps}
    for number in range(WARM_UP_ROUNDS + rounds):
        for each, step in steps.items():
            start = time.process_time()
            step()
            if number >= WARM_UP_ROUNDS:
                times[each].append(1e3 * (time.process_time() - start))
    cells = [f"{statistics.median(times[each]):.1f}" for each in steps]
    for one, other in (("kernels", "recomputing"), ("baseline", "recomputing"), ("baseline", "kernels")):
        cells.append(f"{statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)):.2f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--models", action="store_true", help="also measure whole models")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| step | recomputing, ms | kernels, ms | baseline, ms | kernels' time | ratio before | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in FEED_FORWARDS:
        measure(name, feed_forwards(name, options.batch_size), options.rounds)
    if options.models:
        measure("LocalViT-T and DeiT-T", models(options.batch_size), options.rounds)


if __name__ == "__main__":
    main()
