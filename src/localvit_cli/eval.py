"""`localvit eval`: exact accuracy of a model on labeled images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from localvit_cli import UsageError


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where and how a model runs."""

    device: str | None = None
    """cuda, mps or cpu; by default the first of these that there is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Half precisions run under autocast."""
    batch_size: int | None = None
    """Images a batch and process; by default 16 on a CPU and 128 elsewhere."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main one."""
    channels_last: bool = False
    """Lay images and weights out channels-last."""
    compile: bool = False
    """Compile the model first; pays off over many batches."""
    fuse: bool = True
    """Run the model's inference form; without, the model as it was trained."""

    def options(self):
        """The package's `InferenceOptions`, with the device chosen and said."""
        from localvit.inference.runner import InferenceOptions
        from localvit.utils.devices import DTYPES, choose_device
        from localvit_cli.console import say

        try:
            device, warning = choose_device(self.device)
            options = InferenceOptions(
                batch_size=(16 if device.type == "cpu" else 128) if self.batch_size is None else self.batch_size,
                workers=self.workers,
                device=device,
                dtype=DTYPES[self.dtype],
                channels_last=self.channels_last,
                compile=self.compile,
                fuse=self.fuse,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        say(f"warning: {warning}" if warning else f"device: {device}")
        return options


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a model: each image exactly once, on one process or many (under torchrun)."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint file, or a model's name (its released weights are downloaded unless --checkpoint is given)."""
    data_path: Path | None = None
    """Folder of the data set; only DIGITS has one by default."""
    data_set: str = "IMNET"
    """IMNET, IMNET-A, IMNET-R, CIFAR (100), CIFAR10, INAT, INAT19, FOLDER, DIGITS, or a timm name like hfds/NAME."""
    inat_category: str = "name"
    """Level of the taxonomy that INAT and INAT19 are labeled at."""
    checkpoint: Path | None = None
    """Weights for the model of the given name."""
    weights: Literal["raw", "ema"] = "raw"
    """Raw or averaged weights of a checkpoint."""
    input_size: tuple[int, ...] = ()
    """Side of the images, or height and width, in pixels; by default the model's own."""
    running: Annotated[Running, tyro.conf.arg(name="")] = Running()
    limit: int | None = None
    """Only the first so many images."""
    skip_unreadable: bool = False
    """Leave images that cannot be read out, and say how many, instead of stopping."""
    real_labels: bool = False
    """Also score ImageNet-1k val on the reassessed labels (ImageNet-ReaL, arXiv 2006.07159)."""
    report: Path | None = None
    """Write results.json, per_class.csv and report.html into this folder."""

    def run(self) -> None:
        """Evaluate, and print the published program's line last."""
        from localvit.inference.runner import ready_model

        size = square(self.input_size)
        ready = ready_model(self.model, checkpoint=self.checkpoint, weights=self.weights, input_size=size)
        run_evaluation(self, ready, self.running.options())


def square(sides: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width from one side, both, or none. Raises UsageError for more, or for sides below 1."""
    if len(sides) > 2 or any(side < 1 for side in sides):
        raise UsageError(f"--input-size {' '.join(map(str, sides))}: give one side, or height and width, in pixels")
    return (sides[0], sides[-1]) if sides else None


def run_evaluation(asked: Eval, ready, options) -> None:
    """Evaluate a ready model as `asked`, report, and print the published program's line last."""
    import time
    from dataclasses import replace

    from localvit.checkpoints import versions
    from localvit.data.classes import IMAGENET_SUBSETS, subset_classes
    from localvit.data.datasets import open_images
    from localvit.evaluation.evaluate import evaluate
    from localvit.evaluation.predict import readable_class_names
    from localvit.evaluation.real_labels import real_accuracy
    from localvit.evaluation.report import write_report
    from localvit.utils.distributed import is_main, process_group, rank, world_size
    from localvit_cli.console import progress, say

    with process_group(options.device):
        say(f"model: {ready.description}; {ready.preprocessing}")
        images = open_images(
            asked.data_set,
            asked.data_path,
            inat_category=asked.inat_category,
            remark=lambda message: say(f"warning: {message}"),
        )
        subset = asked.data_set.upper()
        total = len(images) if asked.limit is None else min(asked.limit, len(images))
        started = time.monotonic()
        with progress("eval", len(range(rank(), total, world_size()))) as advance:
            evaluation = evaluate(
                ready.place(options),
                images,
                ready.preprocessing,
                options,
                class_names=ready.class_names,
                valid_classes=subset_classes(subset) if subset in IMAGENET_SUBSETS else None,
                limit=asked.limit,
                skip_unreadable=asked.skip_unreadable,
                progress=advance,
            )
        if not is_main():
            return
        seconds = time.monotonic() - started
        for reason in evaluation.skipped:
            say(f"warning: left out {reason}")
        about = {
            "model": ready.name,
            "weights": ready.description,
            "data_set": asked.data_set,
            "data_path": str(asked.data_path) if asked.data_path else None,
            "preprocessing": ready.preprocessing.to_dict(),
            "device": str(options.device),
            "dtype": str(options.dtype).removeprefix("torch."),
            "seconds": round(seconds, 3),
            "versions": versions(),
        }
        if asked.real_labels:
            real1, real5, count = real_accuracy(evaluation)
            about["real"] = {"acc1": real1, "acc5": real5, "count": count}
            print(f"ReaL Acc@1 {real1:.3f} Acc@5 {real5:.3f} over {count} images")
        if asked.report is not None:
            words = readable_class_names(ready.class_names, len(evaluation.class_names))
            told = replace(evaluation, class_names=words)
            written = write_report(told, asked.report, dataset_root=images.root, about=about)
            say(f"report: {', '.join(str(path) for path in written)}")
        if evaluation.skipped:
            print(f"{len(evaluation.skipped)} unreadable images left out of {total}")
        print(evaluation.line(), flush=True)
