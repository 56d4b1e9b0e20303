"""How near is `localvit eval` to the speed of its parts?

    python benchmarks/eval_speed.py --data-path FOLDER [--models NAME...] [--images 1000] [--rounds 3]

For each model, in interleaved rounds on all cores: (a) decode and transform alone, (b) the model alone on prepared
batches, (c) the whole evaluation. On shared cores the two parts add: per image the machine spends the work of both,
so the fastest possible overlap is 1 / (1/a + 1/b) when each part alone already uses every core; where decoding runs on
cores that the model does not need, it is min(a, b). Both bounds are printed beside the measured rate.
"""

import argparse
import statistics
import time
from itertools import cycle, islice
from pathlib import Path

import torch

import localvit
from localvit.data.classes import imagenet_synsets
from localvit.data.datasets import open_images
from localvit.data.images import FileImages, PreparedImages
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.evaluate import evaluate
from localvit.inference.runner import InferenceOptions, batches, forward


def decode_alone(images, preprocessing, options, count: int) -> float:
    """Images a second through decoding and transforming, every core busy with it."""
    prepared = PreparedImages(images, preprocessing.transform())
    started = time.perf_counter()
    for _ in batches(prepared, range(count), options):
        pass
    return count / (time.perf_counter() - started)


@torch.inference_mode()
def model_alone(model, prepared_batches, options) -> float:
    """Images a second through the model, on batches that lie ready."""
    started = time.perf_counter()
    for images_BCHW in prepared_batches:
        forward(model, images_BCHW, options)
    return sum(len(batch) for batch in prepared_batches) / (time.perf_counter() - started)


def evaluation(model, images, preprocessing, options, count: int) -> float:
    """Images a second through the whole evaluation."""
    started = time.perf_counter()
    evaluate(model, images, preprocessing, options, class_names=imagenet_synsets(), limit=count)
    return count / (time.perf_counter() - started)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with val/<synset>/ images")
    parser.add_argument("--models", nargs="+", default=["localvit_tiny"])
    parser.add_argument("--images", type=int, default=1000, help="taken from the folder in turn, as often as needed")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found = open_images("IMNET", asked.data_path)
    assert isinstance(found, FileImages)
    assert found.root is not None
    assert found.class_names is not None
    samples = list(islice(cycle(zip(found.paths, found.labels, strict=True)), asked.images))
    images, count = FileImages(found.root, samples, found.class_names), asked.images
    preprocessing = Preprocessing.published((224, 224))
    options = InferenceOptions(batch_size=asked.batch_size, workers=asked.workers)
    prepared = PreparedImages(images, preprocessing.transform())
    some = range(min(count, 256))
    ready = [batch for _, batch, _ in batches(prepared, some, options) if batch is not None]
    print(
        f"{count} images, batch {asked.batch_size}, {asked.workers} workers, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; medians over {asked.rounds} interleaved rounds, ratios round by round, images/s"
    )
    print(f"{'model':40} {'decode':>8} {'model':>8} {'whole':>8} {'of shared bound':>16} {'of min':>8}")
    for name in asked.models:
        model = localvit.create_model(name).eval()
        model_alone(model, ready[:1], options)  # warm up
        rates: dict[str, list[float]] = {"decode": [], "model": [], "whole": []}
        for _ in range(asked.rounds):
            rates["decode"].append(decode_alone(images, preprocessing, options, count))
            rates["model"].append(model_alone(model, ready, options))
            rates["whole"].append(evaluation(model, images, preprocessing, options, count))
        rounds = list(zip(*rates.values(), strict=True))
        a, b, c = (statistics.median(part) for part in rates.values())
        of_shared = statistics.median(whole * (1 / decode + 1 / alone) for decode, alone, whole in rounds)
        of_min = statistics.median(whole / min(decode, alone) for decode, alone, whole in rounds)
        print(f"{name:40} {a:8.1f} {b:8.1f} {c:8.1f} {of_shared:15.0%} {of_min:8.0%}", flush=True)


if __name__ == "__main__":
    main()
