"""`localvit eval`: exact accuracy of a model on labeled images."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from localvit.checkpoints import versions
from localvit.data.classes import IMAGENET_SUBSETS, readable_class_names, subset_classes
from localvit.data.datasets import open_stream
from localvit.data.image_stream import ImageStream
from localvit.data.images import Images
from localvit.evaluation.evaluate import Evaluation, evaluate
from localvit.evaluation.metrics import real_accuracy, reassessed_labels
from localvit.evaluation.report.files import FILES, write_report
from localvit.evaluation.unseen_images import open_unseen_images
from localvit.inference.calibration import Calibration
from localvit.inference.runner import InferenceOptions, LoadedModel, load_model
from localvit.utils.devices import DTYPES, choose_device
from localvit.utils.distributed import is_main, process_group, run_on_all_ranks, world_size
from localvit.utils.files import check_writable
from localvit.utils.intervals import accuracy_interval, interval_text
from localvit_cli import UsageError
from localvit_cli.console import progress
from localvit_cli.explain_mistakes import check_explainable, explain_mistakes
from localvit_cli.fit_temperature import check_fit, fit_and_save, measure
from localvit_cli.published_result import published_line
from localvit_cli.streams import printable
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
    """A checkpoint or exported file, or a name (weights outside this package are downloaded without --checkpoint)."""
    data_path: Annotated[Path | None, optional("DIR")] = None
    """Folder of the data set; required, except for DIGITS."""
    data_set: Annotated[str | None, optional("NAME", "that of the checkpoint's run, else IMNET")] = None
    """IMNET, IMNET-A, IMNET-R, CIFAR (100), CIFAR10, INAT, INAT19, FOLDER, DIGITS, or a timm name such as hfds/NAME."""
    inat_category: Annotated[str | None, optional("LEVEL", "that of the checkpoint's run, else name")] = None
    """Level of the taxonomy that provides the labels of INAT and INAT19."""
    checkpoint: Annotated[Path | None, optional("FILE")] = None
    """Weights for the named model."""
    weights: Literal["raw", "ema"] = "raw"
    """Use the raw or the averaged (EMA) weights of a checkpoint."""
    input_size: Annotated[tuple[int, ...], optional("PIXELS...", "the model's own")] = ()
    """Side of the input, or its height and width, in pixels."""
    running: Annotated[InferenceFlags, tyro.conf.arg(name="")] = InferenceFlags()
    include_trained: bool = False
    """Evaluate also on the images of the folder that the model was trained on; by default they are left out."""
    limit: Annotated[int | None, optional("N")] = None
    """Evaluate only the first N images."""
    skip_unreadable: bool = False
    """Skip and count unreadable images instead of stopping."""
    real_labels: bool = False
    """Also report accuracy on the reassessed labels of ImageNet-1k val (ImageNet-ReaL, arXiv 2006.07159)."""
    fit_temperature: Annotated[Path | None, optional("FILE")] = None
    """Fit a temperature to these images, which makes probabilities agree with the accuracy, and write the checkpoint
    with it to FILE, which may be the evaluated one. Used by predict --calibrated and in exported files."""
    report: Annotated[Path | None, optional("DIR")] = None
    """Folder to write results.json, per_class.csv and report.html to."""
    explain: bool = False
    """Show in the report which patches speak for the true and for the predicted class of each listed mistake."""

    def run(self) -> None:
        """Evaluate and print the result; the last line has the published program's format."""
        if self.explain and self.report is None:
            raise UsageError("--explain shows what the model looks at in the report: add --report DIR")
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
    check_explainable(command, loaded)
    with process_group(options.device):
        logger.info(f"model: {loaded}")
        command = _with_data_set_of_run(command, loaded.about)
        images, num_trained_on = _open(command, loaded.about)
        total = _number_of(images, command.limit)
        run_on_all_ranks(lambda: _check_outputs(command, loaded, images, num_trained_on))
        data_set = str(command.data_set).upper()
        started = time.monotonic()
        with progress("eval", total, processes=world_size()) as advance:
            evaluation = evaluate(
                loaded,
                images,
                options=options,
                valid_classes=subset_classes(data_set) if data_set in IMAGENET_SUBSETS else None,
                limit=command.limit,
                skip_unreadable=command.skip_unreadable,
                keep_logits=command.fit_temperature is not None or loaded.calibration is not None,
                progress=advance,
            )
        if is_main():
            evaluation = replace(evaluation, num_trained_on=num_trained_on)
            about = _about(command, loaded, options, time.monotonic() - started)
            try:
                _print_result(command, loaded, evaluation, about)
            finally:  # the report is written even if nobody reads the result
                fitted = loaded.calibration
                try:
                    fitted = fit_and_save(command, loaded, evaluation) if command.fit_temperature else fitted
                finally:
                    _write_report(command, loaded, evaluation, fitted, images, options, about)
        evaluation.check_finite()


def _with_data_set_of_run(command: Eval, about: dict[str, Any]) -> Eval:
    """The command with the data set that the model was trained on, unless another one is given.

    Where it is must be given: a checkpoint does not decide which folder is read. Raises UsageError if it is not.
    """
    config = about.get("config")
    config = config if isinstance(config, dict) else {}
    trained_on = str(config.get("data_set") or "IMNET")
    if command.data_set is None and "/" in trained_on:
        raise UsageError(f"the model was trained on {trained_on}: give the data set to evaluate on with --data-set")
    is_digits = trained_on.upper() == "DIGITS"
    # In a folder that is given, no digits are written.
    data_set = command.data_set or ("FOLDER" if is_digits and command.data_path else trained_on)
    if command.data_set is None and command.data_path is None and config.get("data_path") and not is_digits:
        raise UsageError(f"give the folder with --data-path; the model was trained on {config['data_path']}")
    level = command.inat_category or str(config.get("inat_category") or "name")
    return replace(command, data_set=data_set, inat_category=level)


def _open(command: Eval, about: dict[str, Any]) -> tuple[Images | ImageStream, int]:
    """The images to evaluate on, and how many of them the model was trained on."""
    data_set = str(command.data_set)
    stream = run_on_all_ranks(lambda: open_stream(data_set, command.data_path))
    if stream is not None:
        return stream, 0
    return open_unseen_images(
        data_set,
        command.data_path,
        about,
        inat_category=str(command.inat_category),
        include_trained=command.include_trained,
    )


def _number_of(images: Images | ImageStream, limit: int | None) -> int | None:
    """How many images will be evaluated; None if the description of a stream does not say it."""
    count = images.num_images if isinstance(images, ImageStream) else len(images)
    return count if limit is None or count is None else min(limit, count)


def _check_outputs(command: Eval, loaded: LoadedModel, images: Images | ImageStream, num_trained_on: int) -> None:
    """Raise now what would otherwise be raised after the evaluation."""
    check_fit(command, loaded, num_trained_on)
    if isinstance(images, ImageStream):
        if command.real_labels or command.explain:
            raise UsageError(
                f"{'--real-labels' if command.real_labels else '--explain'} needs images that can be found again, and "
                f"--data-set {command.data_set} is a stream: use a folder, or uncompressed tar files on this machine"
            )
    elif command.real_labels:
        count = len(images) if command.limit is None else min(command.limit, len(images))
        reassessed_labels([images.name(index) for index in range(count)], loaded.class_names)
    if command.report is not None and is_main():
        for name in FILES:
            check_writable(command.report / name)


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


def _print_result(command: Eval, loaded: LoadedModel, evaluation: Evaluation, about: dict[str, Any]) -> None:
    for reason in evaluation.skipped:
        logger.warning(f"skipped {printable(reason)}")
    if command.real_labels:
        real1, real5, count = real_accuracy(evaluation)
        about["real"] = {"acc1": real1, "acc5": real5, "count": count}
        about["real"]["acc1_interval"] = accuracy_interval(real1, count)
        interval = interval_text(real1, count)
        print(f"ReaL Acc@1 {real1:.3f} Acc@5 {real5:.3f} ({count:,} images, 95 % interval of Acc@1 {interval})")
    if evaluation.skipped:
        count = len(evaluation.paths) + len(evaluation.skipped)
        print(f"skipped {len(evaluation.skipped):,} unreadable of {count:,} images")
    if evaluation.num_trained_on:
        about["trained_on_images"] = evaluation.num_trained_on
        print(f"the model was trained on {evaluation.num_trained_on:,} of the {len(evaluation.paths):,} images")
    print(evaluation.line(), flush=True)
    count = len(evaluation.paths)
    logger.info(f"95 % interval of Acc@1: {interval_text(evaluation.acc1, count)} ({count:,} images)")
    if line := published_line(loaded, evaluation, str(command.data_set).upper()):
        logger.info(line)


def _write_report(
    command: Eval,
    loaded: LoadedModel,
    evaluation: Evaluation,
    calibration: Calibration | None,
    images: Images | ImageStream,
    options: InferenceOptions,
    about: dict[str, Any],
) -> None:
    effect = measure(evaluation, calibration)
    if command.report is None:
        return
    names = readable_class_names(loaded.class_names, len(evaluation.class_names))
    explained = None
    if command.explain and isinstance(images, Images):
        explained = explain_mistakes(loaded, evaluation, images, options)
    calibrated = (calibration, effect) if calibration and effect else None
    paths = write_report(
        replace(evaluation, class_names=names),
        command.report,
        dataset_root=images.root if isinstance(images, Images) else None,
        about=about,
        calibrated=calibrated,
        explained=explained,
    )
    logger.info(f"report: {', '.join(str(path) for path in paths)}")
