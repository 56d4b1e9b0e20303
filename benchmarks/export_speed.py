"""Which graph do runtimes run faster: the fused one, or the one they fold themselves? And how fast beside torch?

python benchmarks/export_speed.py localvit_tiny deit_tiny_patch16_224

Random weights, on the CPU. The variants run in turn, round by round; medians of images per second.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import localvit
from localvit.inference.runtimes import OnnxRuntime, OpenVINORuntime


def variants(name: str, folder: Path) -> dict[str, object]:
    """What is measured, by what it is: a function of a batch of normalized images."""
    torch.manual_seed(0)
    model = localvit.create_model(name).eval()
    calls = {}
    with torch.inference_mode():
        fused = localvit.fuse(model)
    calls["torch, fused"] = lambda images: fused(torch.from_numpy(images))
    for fuse in (False, True):
        path = folder / f"{name}-{fuse}.onnx"
        localvit.export(model, path, localvit.Onnx(include=(), fuse=fuse))
        graph = "fused" if fuse else "unfused"
        calls[f"ONNX Runtime, {graph}"] = OnnxRuntime(path).run
        calls[f"OpenVINO float32, {graph}"] = OpenVINORuntime(path).run
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls = {(name, how): call for name in arguments.names for how, call in _calls(name, Path(folder))}
        for batch in arguments.batch_sizes:
            images = torch.randn(batch, 3, 224, 224).numpy()
            seconds = {key: [] for key in calls}
            for number in range(arguments.rounds + 1):
                for key, call in calls.items():
                    started = time.perf_counter()
                    call(images)
                    if number:  # the first round warms up
                        seconds[key].append(time.perf_counter() - started)
            print(f"\nbatch {batch}, {torch.get_num_threads()} threads")
            for (name, how), each in seconds.items():
                print(f"{name:28} {how:28} {batch / statistics.median(each):8.1f} images/s", flush=True)


def _calls(name: str, folder: Path):
    with torch.inference_mode(False):  # tracing needs autograd's bookkeeping
        return list(variants(name, folder).items())


if __name__ == "__main__":
    main()
