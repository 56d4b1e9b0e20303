"""Measure training steps, and the cost of the training loop and of loading images compared with the bare model.

    python benchmarks/train_speed.py loop|loader|memory --data-path FOLDER [--model localvit_tiny] [--rounds 5]
    python benchmarks/train_speed.py cache --data-path FOLDER [--recipe cifar10] [--steps 8] [--cuda-graph]
    python benchmarks/train_speed.py step [--family T] [--batch-size 16] [--rounds 5] [--device cpu]
        [--compile] [--cuda-graph]

`step` compares training steps (forward, backward, update) of a LocalViT with those of its baseline, and of the same
LocalViT in the implementation of `benchmarks/straightforward.py`. The three run in turn on random images, in float32
and under bfloat16 autocast; ratios are taken within rounds.

`loop` compares the CPU time of full steps of `localvit train` with that of only forward, backward and update of the
same model on the same batches, in interleaved rounds. `loader` reads images with `localvit train`'s batches and with
timm's loader, with the same transforms, batch size and workers, in interleaved rounds. `memory` trains 1,000 steps and
prints the memory of the process every 100. `cache` takes steps of a recipe with its images decoded by workers and in
memory (--cache), in interleaved rounds, and then only prepares the batches of both. FOLDER contains train/<class>/ and
val/<class>/, or class folders.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from families_speed import FAMILIES, WARM_UP_CALLS, prepare_straightforward
from timm.data import create_dataset, create_loader
from torch import nn

from localvit.bench.measure import time_rounds
from localvit.bench.prepare import BenchModel, BenchOptions, prepare
from localvit.bench.result import Quartiles
from localvit.train.builder import Training, build
from localvit.train.config import TrainConfig
from localvit.train.cuda_graph import GraphedModel
from localvit.train.recipe import read_recipe
from localvit.train.step import train_step
from localvit.utils.devices import choose_device
from localvit_cli.allocator import keep_freed_memory


def build_run(options: argparse.Namespace, **changes) -> Training:
    """A run with the published settings on the given images."""
    settings = {
        "model": options.model,
        "data_set": "FOLDER",
        "data_path": options.data_path,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "output_dir": Path("runs/speed"),
        "repeated_aug": False,
        "ema_decay": None,
        "warmup_epochs": 0,
    }
    return build(TrainConfig(**settings | changes))


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, images_BCHW, targets) -> float:
    """Only forward, backward and update."""
    model.train()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images_BCHW), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def loop(options: argparse.Namespace) -> None:
    """CPU seconds per step, bare and full, on batches in memory, with one thread to reduce noise."""
    torch.set_num_threads(1)
    run = build_run(options, mixup=0.0, cutmix=0.0, label_smoothing=0.0, workers=0)
    ready = list(islice(run.batches.epoch(0), options.steps))
    seconds: dict[str, list[float]] = {"bare": [], "full": []}
    for number in range(options.rounds + 1):
        for name in seconds:
            batches = iter(ready)
            started = time.process_time()
            for images_BCHW, labels_B in ready:
                if name == "bare":
                    bare_step(run.state.model, run.state.optimizer, images_BCHW, labels_B)
                else:
                    train_step(run, batches, stop=False)
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - started) / len(ready))
    ratios = [full / bare - 1 for bare, full in zip(*seconds.values(), strict=True)]
    bare, full = (statistics.median(part) for part in seconds.values())
    rounds = ", ".join(f"{ratio:+.2%}" for ratio in ratios)
    print(
        f"{options.model}, batch {options.batch_size}: bare {bare:.4f} CPU s per step, full {full:.4f}; "
        f"the loop costs {statistics.median(ratios):+.2%} (rounds {rounds})"
    )


def loader(options: argparse.Namespace) -> None:
    """Images per second of both loaders."""
    run = build_run(options)
    images = run.batches.images.images
    folder = options.data_path / "train" if (options.data_path / "train").is_dir() else options.data_path
    transform = run.batches.images.repeated.transform
    dataset = create_dataset("", root=str(folder), split="train")
    timm_loader = create_loader(
        dataset,
        input_size=(3, *run.preprocessing.input_size),
        batch_size=options.batch_size,
        is_training=True,
        use_prefetcher=False,
        num_workers=options.workers,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    dataset.transform = transform
    rates: dict[str, list[float]] = {"ours": [], "timm's": []}
    list(islice(run.batches.epoch(0), 2)), list(islice(timm_loader, 2))  # start the workers
    for number in range(options.rounds):
        for name in rates:
            batches = run.batches.epoch(number) if name == "ours" else timm_loader
            started, count = time.perf_counter(), 0
            for images_BCHW, _ in batches:
                count += len(images_BCHW)
            rates[name].append(count / (time.perf_counter() - started))
    ratios = [ours / other for ours, other in zip(*rates.values(), strict=True)]
    ours, other = (statistics.median(part) for part in rates.values())
    rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(
        f"{len(images)} images, batch {options.batch_size}, {options.workers} workers: ours {ours:.0f} images/s, "
        f"timm's {other:.0f}; ratio {statistics.median(ratios):.3f} (rounds {rounds})"
    )


def memory(options: argparse.Namespace) -> None:
    """Memory of the process in MB, every 100 of 1,000 steps."""
    run = build_run(options, epochs=1000, ema_decay=0.99)
    page, taken = os.sysconf("SC_PAGE_SIZE"), 0
    for epoch in range(1000):
        run.state.epoch = epoch
        batches = run.batches.epoch(epoch)
        for step in range(run.steps_per_epoch):
            run.state.step = step
            train_step(run, batches, stop=False)
            taken += 1
            if taken % 100 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                print(f"step {taken}: {pages * page / 1e6:.0f} MB", flush=True)
            if taken == 1000:
                return


def cache(options: argparse.Namespace) -> None:
    """Seconds per step with and without images in memory, and images per second of their batches alone."""
    settings = {name: value for name, value in read_recipe(options.recipe).items() if name != "cache"}
    settings |= {"batch_size": options.batch_size, "device": options.device, "cuda_graph": options.cuda_graph}
    runs = {name: build_run(options, **settings | {"cache": name == "memory"}) for name in ("workers", "memory")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            batches = run.batches.epoch(number)
            started = time.perf_counter()
            for _ in range(options.steps):
                train_step(run, batches, stop=False)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / options.steps)
            batches.close()
    ratios = [workers / memory for workers, memory in zip(*seconds.values(), strict=True)]
    print(
        f"{options.recipe}, batch {options.batch_size}, seconds per step: "
        + ", ".join(f"{name} {statistics.median(part):.4f}" for name, part in seconds.items())
        + f"; ratio {statistics.median(ratios):.2f} (rounds {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )
    for name, run in runs.items():
        started, count = time.perf_counter(), 0
        for images_BCHW, _ in run.batches.epoch(options.rounds + 1):
            count += len(images_BCHW)
        print(f"batches only, {name}: {count / (time.perf_counter() - started):,.0f} images/s")


def step(options: argparse.Namespace) -> None:
    """Seconds per training step of a LocalViT, its baseline, and the straightforward implementation."""
    keep_freed_memory()
    device, warning = choose_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{warning or name}, torch {torch.__version__}, batch {options.batch_size}, {options.rounds} rounds")
    print("| LocalViT | dtype | run | ms per step | of the baseline | of the straightforward one |")
    print("|---|---|---|---|---|---|")
    runs = ["eager", *(["compiled"] if options.compile else []), *(["CUDA graph"] if options.cuda_graph else [])]
    for dtype in (torch.float32, torch.bfloat16):
        for run in runs:
            bench = BenchOptions(
                device=device,
                dtype=dtype,
                train=True,
                batch_sizes=(options.batch_size,),
                rounds=options.rounds,
                compile=run == "compiled",
            )
            seconds = step_seconds(options.family, bench, run, options.steps if device.type == "cuda" else 1)
            own = seconds.pop("localvit")
            ratios = [
                Quartiles.of([mine / each for mine, each in zip(own, other, strict=True)]) for other in seconds.values()
            ]
            cells = [f"{each.median:.2f} ({each.first_quartile:.2f} to {each.third_quartile:.2f})" for each in ratios]
            label = str(dtype).removeprefix("torch.")
            milliseconds = f"{1000 * statistics.median(own):.1f}"
            print(f"| {' | '.join([options.family, label, run, milliseconds, *cells])} |", flush=True)


def step_seconds(family: str, bench: BenchOptions, run: str, calls_per_round: int) -> dict[str, list[float]]:
    """Seconds per step and round of the three models."""
    torch._dynamo.reset()  # torch.compile keeps the code of only a few models per class
    name, baseline = FAMILIES[family]
    models = {
        "localvit": prepare(name, bench),
        "baseline": prepare(baseline, bench),
        "straightforward": prepare_straightforward(name, bench),
    }
    if run == "CUDA graph":
        models = {label: graphed(model) for label, model in models.items()}
    (batch_size,) = bench.batch_sizes
    calls = {label: model.call(batch_size) for label, model in models.items()}
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    return time_rounds(calls, dict.fromkeys(calls, calls_per_round), bench, lambda rounds: None)


def graphed(model: BenchModel) -> BenchModel:
    """The model with its forward and backward pass in CUDA graphs, as `localvit train --cuda-graph` runs it."""
    (batch_size,) = model.options.batch_sizes
    sample_BCHW = torch.zeros(batch_size, *model.input_size, device=model.options.device)
    module: Any = GraphedModel(model.module, sample_BCHW, model.options.dtype)
    module.num_classes = model.module.num_classes
    return replace(model, module=module)


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=["step", "loop", "loader", "memory", "cache"])
    parser.add_argument("--data-path", type=Path, help="folder of images; not for `step`")
    parser.add_argument("--model", default="localvit_tiny")
    parser.add_argument("--recipe", default="cifar10", help="recipe of `cache`")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="steps per round of `loop`, `cache`, and `step` on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--family", choices=list(FAMILIES), default="T", help="LocalViT and baseline of `step`")
    parser.add_argument("--device", help="device of `step` and `cache`; default: CUDA if available, otherwise the CPU")
    parser.add_argument("--compile", action="store_true", help="`step` also measures compiled models")
    parser.add_argument("--cuda-graph", action="store_true", help="`cache` uses, and `step` also measures, CUDA graphs")
    options = parser.parse_args()
    if options.measurement != "step" and options.data_path is None:
        parser.error(f"{options.measurement} needs --data-path")
    if options.measurement == "step" and options.cuda_graph and not torch.cuda.is_available():
        parser.error("--cuda-graph needs a CUDA device, and torch finds none")
    {"step": step, "loop": loop, "loader": loader, "memory": memory, "cache": cache}[options.measurement](options)


if __name__ == "__main__":
    main()
