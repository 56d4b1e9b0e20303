"""`localvit explain`: what a model looks at, and what locality changes."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from localvit.data.folders import PathImages, scan_folder
from localvit.data.images import DataError, ImageSequence
from localvit.explanations import Explanation, explain, layers_of, measure_locality, write_explanations
from localvit.explanations.explain import class_index
from localvit.inference.runner import InferenceOptions, LoadedModel, load_model
from localvit.utils.devices import choose_device
from localvit.utils.files import check_writable
from localvit_cli import UsageError
from localvit_cli.console import progress
from localvit_cli.eval import image_size
from localvit_cli.streams import printable
from localvit_cli.tyro_rules import optional

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Show what a model looks at in images. Exits with 1 if an image is unreadable."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint file, or a name (weights outside this package are downloaded without --checkpoint)."""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...", help_behavior_hint="")]
    """Files, folders (including their subfolders, without hidden ones) and patterns such as 'photos/**/*.jpg'."""
    output: Annotated[Path | None, optional("DIR")] = None
    """Folder to write a PNG for each image, explain.html and explain.json to; required."""
    method: Literal["attention", "rollout", "cam", "locality"] = "cam"
    """attention: of each layer. rollout: of all layers together. cam: the patches that speak for a class. locality: how
    far the model looks, and its accuracy without the neighbors of its depth-wise convolutions, which needs a folder
    with one subfolder per class; writes locality.png, locality.json and explain.html."""
    target: Annotated[str | None, optional("CLASS", "the predicted class")] = None
    """Name or index of the class that cam shows."""
    beside: Annotated[tuple[str, ...], optional("MODEL...")] = ()
    """Models to show beside it (locality only), such as one trained without locality."""
    limit: Annotated[int | None, optional("N", "all")] = None
    """Number of images, chosen at random with a fixed seed (locality only)."""
    checkpoint: Annotated[Path | None, optional("FILE")] = None
    """Weights for the named model."""
    weights: Literal["raw", "ema"] = "raw"
    """Use the raw or the averaged (EMA) weights of a checkpoint."""
    input_size: Annotated[tuple[int, ...], optional("PIXELS...", "the model's own")] = ()
    """Side of the input, or its height and width, in pixels."""
    device: Annotated[str | None, optional("NAME", "the first of these that is available")] = None
    """cuda, mps or cpu."""
    batch_size: Annotated[int | None, optional("N", "16 on a CPU, else 128")] = None
    """Images per batch."""
    workers: int = 2
    """Number of processes that decode images. 0 decodes in the main process."""

    def run(self) -> int:
        """Explain the images and write the files. Returns 1 if any image has no explanation."""
        if not self.paths:
            raise UsageError("no images given; add files, folders or patterns after the model")
        if self.output is None:
            raise UsageError("--output DIR is required: the folder to write the images and the page to")
        if self.target is not None and self.method != "cam":
            raise UsageError(f"--target has no effect on --method {self.method}, which does not depend on a class")
        for flag, given in (("--beside", self.beside), ("--limit", self.limit is not None)):
            if given and self.method != "locality":
                raise UsageError(f"{flag} works with --method locality only")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit} must be at least 1")
        size = image_size(self.input_size)
        options = self._options()
        if self.method == "locality":
            return self._measure(size, options, self.output)
        check_writable(self.output / "explain.html")
        images = PathImages(self.paths)
        loaded = load_model(self.model, checkpoint=self.checkpoint, weights=self.weights, input_size=size)
        logger.info(f"model: {loaded}")
        return self._explain(loaded, images, options, self.output)

    def _options(self) -> InferenceOptions:
        try:
            device, warning = choose_device(self.device)
            # A fused model has the same maps up to rounding, but loses the names of its layers' parts.
            options = InferenceOptions(device=device, batch_size=self.batch_size, workers=self.workers, fuse=False)
        except ValueError as error:
            raise UsageError(str(error)) from error
        logger.log(logging.WARNING if warning else logging.INFO, warning or f"device: {device}")
        return options

    def _explain(self, loaded: LoadedModel, images: PathImages, options: InferenceOptions, output: Path) -> int:
        try:
            target = class_index(self.target, loaded.class_names)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        assert self.method != "locality"
        explanations: Iterable[Explanation] = explain(loaded, images, self.method, target=target, options=options)
        with progress("explain", len(images)) as advance:

            def done(each: Explanation) -> None:
                if each.error:
                    logger.warning(f"{printable(each.file)}: {printable(each.error)}")
                advance(1)

            _, failed = write_explanations(explanations, output, self.method, model=str(loaded), done=done)
        if failed:
            logger.warning(f"{failed:,} of {len(images):,} images have no explanation")
        print(output / "explain.html")
        return 1 if failed else 0

    def _measure(self, size: tuple[int, int] | None, options: InferenceOptions, output: Path) -> int:
        from localvit.explanations.measures_files import FIGURE, MAX_MODELS, write_measures  # needs matplotlib

        if len(self.beside) >= MAX_MODELS:
            raise UsageError(f"--beside takes at most {MAX_MODELS - 1} models")
        check_writable(output / FIGURE)
        images = self._images_with_labels()
        measured = []
        for source, checkpoint in ((self.model, self.checkpoint), *((each, None) for each in self.beside)):
            loaded = load_model(source, checkpoint=checkpoint, weights=self.weights, input_size=size)
            logger.info(f"model: {loaded}")
            layers_of(loaded.model)
            with progress("explain", min(self.limit or len(images), len(images))) as advance:
                name = _label(source, loaded)
                measured.append(measure_locality(loaded, images, options, name=name, limit=self.limit, done=advance))
        for path in write_measures(measured, output):
            print(path)
        return 0

    def _images_with_labels(self) -> ImageSequence:
        """The images with their folders as labels, if the only path is a folder of class folders."""
        if len(self.paths) == 1 and Path(self.paths[0]).is_dir():
            try:
                return scan_folder(Path(self.paths[0]), is_split=True)[0]
            except DataError as error:
                logger.warning(f"no accuracy is measured: {error}")
        else:
            logger.warning("no accuracy is measured: give a single folder with one subfolder per class for that")
        return PathImages(self.paths)


def _label(source: str, loaded: LoadedModel) -> str:
    """A short name for a figure: the folder of a run, the file's name, or the model's name."""
    path = Path(source)
    if not path.is_file():
        return loaded.name
    return path.parent.name if path.stem in ("best", "last") and path.parent.name else path.stem
