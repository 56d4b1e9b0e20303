"""How close `localvit eval` comes to the speed of its parts.

    python benchmarks/eval_speed.py --data-path FOLDER [--models NAME...] [--images 1000] [--rounds 3]

Measures for each model, in interleaved rounds on all cores: (a) decoding and transforming the images, (b) the model on
batches that are already in memory, (c) the whole evaluation. If both parts use every core, their work adds up, so
the highest possible rate is 1 / (1/a + 1/b). If decoding runs on cores that the model does not need, it is min(a, b).
The measured rate is printed as a percentage of both bounds.
"""

import argparse
import statistics
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

import localvit
from localvit.data.classes import imagenet_synsets
from localvit.data.datasets import open_images
from localvit.data.images import FileImages, Images
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.evaluate import evaluate
from localvit.inference.runner import InferenceOptions, Runner


def decode_rate(runner: Runner, images: Images) -> float:
    """Images per second that the worker processes decode and transform."""
    started = time.perf_counter()
    for _ in runner.load_batches(images, range(len(images))):
        pass
    return len(images) / (time.perf_counter() - started)


@torch.inference_mode()
def model_rate(runner: Runner, batches: list[Tensor]) -> float:
    """Images per second that the model processes."""
    started = time.perf_counter()
    for images_BCHW in batches:
        runner.logits(images_BCHW)
    return sum(len(batch) for batch in batches) / (time.perf_counter() - started)


def evaluation_rate(runner: Runner, images: Images) -> float:
    """Images per second of the whole evaluation."""
    started = time.perf_counter()
    evaluate(runner.model, images, runner.preprocessing, runner.options, class_names=imagenet_synsets())
    return len(images) / (time.perf_counter() - started)


def repeated_images(data_path: Path, count: int) -> Images:
    """The images of the validation split, repeated until there are `count`."""
    found = open_images("IMNET", data_path)
    assert isinstance(found, FileImages)
    assert found.root is not None
    assert found.class_names is not None
    samples = list(islice(cycle(zip(found.paths, found.labels, strict=True)), count))
    return FileImages(found.root, samples, found.class_names)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with val/<synset>/ images")
    parser.add_argument("--models", nargs="+", default=["localvit_tiny"])
    parser.add_argument("--images", type=int, default=1000, help="number of images, repeated if there are fewer")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    images = repeated_images(flags.data_path, flags.images)
    device = torch.device("cpu")
    options = InferenceOptions(batch_size=flags.batch_size, workers=flags.workers, device=device)
    print(
        f"{flags.images} images, batch size {flags.batch_size}, {flags.workers} workers, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}; images/s, medians of {flags.rounds} interleaved rounds"
    )
    print(f"{'model':32} {'decode':>8} {'model':>8} {'eval':>8} {'of shared':>10} {'of slower':>10}")
    for name in flags.models:
        model = localvit.create_model(name).eval()
        runner = Runner.of(model, Preprocessing.published((224, 224)), options)
        batches = [
            batch for _, batch, _ in runner.load_batches(images, range(min(len(images), 256))) if batch is not None
        ]
        model_rate(runner, batches[:1])  # warm up
        rounds = [
            (decode_rate(runner, images), model_rate(runner, batches), evaluation_rate(runner, images))
            for _ in range(flags.rounds)
        ]
        decode, alone, whole = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        of_shared = statistics.median(c * (1 / a + 1 / b) for a, b, c in rounds)
        of_slower = statistics.median(c / min(a, b) for a, b, c in rounds)
        print(f"{name:32} {decode:8.1f} {alone:8.1f} {whole:8.1f} {of_shared:10.0%} {of_slower:10.0%}", flush=True)


if __name__ == "__main__":
    main()
