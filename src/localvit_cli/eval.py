"""`localvit eval`: exact accuracy of a model on labeled images."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from localvit.checkpoints import versions
from localvit.data.classes import IMAGENET_SUBSETS, readable_class_names, subset_classes
from localvit.data.datasets import open_images
from localvit.evaluation.evaluate import Evaluation, evaluate
from localvit.evaluation.metrics import real_accuracy
from localvit.evaluation.report.files import write_report
from localvit.inference.runner import InferenceOptions, LoadedModel, load_model
from localvit.utils.devices import DTYPES, choose_device
from localvit.utils.distributed import is_main, process_group, rank, world_size
from localvit_cli import UsageError
from localvit_cli.console import progress
from localvit_cli.tyro_rules import optional

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InferenceFlags:
    """Where and how the model runs."""

    device: Annotated[str | None, optional("NAME", "the first of these that is available")] = None
    """cuda, mps or cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision. bfloat16 and float16 use autocast."""
    batch_size: Annotated[int | None, optional("N", "16 on a CPU, else 128")] = None
    """Images per batch and process."""
    workers: int = 2
    """Number of processes that decode images. 0 decodes in the main process."""
    channels_last: bool = False
    """Use the channels-last memory format."""
    compile: bool = False
    """Compile the model first, which pays off over many batches."""
    fuse: bool = True
    """Run the fused model, which is faster. --no-fuse runs the model as it was trained."""

    def options(self) -> InferenceOptions:
        """The package's options, with the device chosen and logged. Raises UsageError for values out of range."""
        try:
            device, warning = choose_device(self.device)
            options = InferenceOptions(
                batch_size=self.batch_size,
                workers=self.workers,
                device=device,
                dtype=DTYPES[self.dtype],
                channels_last=self.channels_last,
                compile=self.compile,
                fuse=self.fuse,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        if warning:
            logger.warning(warning)
        else:
            logger.info(f"device: {device}")
        return options


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a model on labeled images, each exactly once; works under torchrun."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint file, or a model's name (downloads its released weights, unless --checkpoint is given)."""
    data_path: Annotated[Path | None, optional("DIR")] = None
    """Folder of the data set; required, except for DIGITS."""
    data_set: Annotated[str, tyro.conf.arg(metavar="NAME")] = "IMNET"
    """IMNET, IMNET-A, IMNET-R, CIFAR (100), CIFAR10, INAT, INAT19, FOLDER, DIGITS, or a timm name such as hfds/NAME."""
    inat_category: Annotated[str, tyro.conf.arg(metavar="LEVEL")] = "name"
    """Level of the taxonomy that provides the labels of INAT and INAT19."""
    checkpoint: Annotated[Path | None, optional("FILE")] = None
    """Weights for the named model."""
    weights: Literal["raw", "ema"] = "raw"
    """Use the raw or the averaged (EMA) weights of a checkpoint."""
    input_size: Annotated[tuple[int, ...], optional("PIXELS...", "the model's own")] = ()
    """Side of the input, or its height and width, in pixels."""
    running: Annotated[InferenceFlags, tyro.conf.arg(name="")] = InferenceFlags()
    limit: Annotated[int | None, optional("N")] = None
    """Evaluate only the first N images."""
    skip_unreadable: bool = False
    """Skip and count unreadable images instead of stopping."""
    real_labels: bool = False
    """Also report accuracy on the reassessed labels of ImageNet-1k val (ImageNet-ReaL, arXiv 2006.07159)."""
    report: Annotated[Path | None, optional("DIR")] = None
    """Folder to write results.json, per_class.csv and report.html to."""

    def run(self) -> None:
        """Evaluate and print the result; the last line has the published program's format."""
        size = image_size(self.input_size)
        loaded = load_model(self.model, checkpoint=self.checkpoint, weights=self.weights, input_size=size)
        run_evaluation(self, loaded, self.running.options())


def image_size(sides: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width from `--input-size`: one side, both, or none. Raises UsageError for anything else."""
    if len(sides) > 2 or any(side < 1 for side in sides):
        raise UsageError(f"--input-size {' '.join(map(str, sides))}: give one side, or height and width, in pixels")
    return (sides[0], sides[-1]) if sides else None


def run_evaluation(command: Eval, loaded: LoadedModel, options: InferenceOptions) -> None:
    """Evaluate a loaded model with the settings of `command`, print the result and write the report."""
    with process_group(options.device):
        logger.info(f"model: {loaded}")
        images = open_images(command.data_set, command.data_path, inat_category=command.inat_category)
        data_set = command.data_set.upper()
        total = len(images) if command.limit is None else min(command.limit, len(images))
        started = time.monotonic()
        with progress("eval", len(range(rank(), total, world_size()))) as advance:
            evaluation = evaluate(
                loaded,
                images,
                options=options,
                valid_classes=subset_classes(data_set) if data_set in IMAGENET_SUBSETS else None,
                limit=command.limit,
                skip_unreadable=command.skip_unreadable,
                progress=advance,
            )
        if is_main():
            about = _about(command, loaded, options, time.monotonic() - started)
            _print_result(command, loaded, evaluation, images.root, about)
        evaluation.check_finite()


def _about(command: Eval, loaded: LoadedModel, options: InferenceOptions, seconds: float) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "weights": loaded.description,
        "data_set": command.data_set,
        "data_path": str(command.data_path) if command.data_path else None,
        "preprocessing": loaded.preprocessing.to_dict(),
        "device": str(options.device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
        "versions": versions(),
    }


def _print_result(
    command: Eval, loaded: LoadedModel, evaluation: Evaluation, root: Path | None, about: dict[str, Any]
) -> None:
    for reason in evaluation.skipped:
        logger.warning(f"skipped {reason}")
    if command.real_labels:
        real1, real5, count = real_accuracy(evaluation)
        about["real"] = {"acc1": real1, "acc5": real5, "count": count}
        print(f"ReaL Acc@1 {real1:.3f} Acc@5 {real5:.3f} ({count:,} images)")
    if command.report is not None:
        names = readable_class_names(loaded.class_names, len(evaluation.class_names))
        paths = write_report(replace(evaluation, class_names=names), command.report, dataset_root=root, about=about)
        logger.info(f"report: {', '.join(str(path) for path in paths)}")
    if evaluation.skipped:
        count = len(evaluation.paths) + len(evaluation.skipped)
        print(f"skipped {len(evaluation.skipped):,} unreadable of {count:,} images")
    print(evaluation.line(), flush=True)
