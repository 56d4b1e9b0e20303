"""What does the adapter of `localize` cost in forward time?

    python benchmarks/localize_speed.py [--model deit_small_patch16_224] [--batch-size 16] [--rounds 9]

In each mode the plain and the localized model, compiled separately, run in turn on all cores. The ratio is the median
over rounds of localized over plain time.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import localvit

MODES = {
    "eager float32": (torch.float32, False),
    "compiled float32": (torch.float32, True),
    "eager bfloat16": (torch.bfloat16, False),
    "compiled bfloat16": (torch.bfloat16, True),
}


@torch.inference_mode()
def seconds(model: nn.Module, images_BCHW: Tensor) -> float:
    started = time.perf_counter()
    model(images_BCHW)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    args = parser.parse_args()
    print(f"{args.model}, batch {args.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| mode | plain, ms | localized, ms | localized / plain | middle half of rounds |\n|---|---|---|---|---|")
    for mode in args.modes:
        dtype, compiled = MODES[mode]
        plain = localvit.create_model(args.model).eval().to(dtype)
        models = [plain, localvit.localize(plain)]
        if compiled:
            torch._dynamo.reset()
            models = [torch.compile(model) for model in models]
        images_BCHW = torch.randn(args.batch_size, *plain.pretrained_cfg["input_size"]).to(dtype)
        for model in models * 2:
            seconds(model, images_BCHW)
        rounds = [[seconds(model, images_BCHW) for model in models] for _ in range(args.rounds)]
        ratios = [localized / before for before, localized in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = [f"{1000 * statistics.median(times):.0f}" for times in zip(*rounds, strict=True)]
        cells = [mode, *medians, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
