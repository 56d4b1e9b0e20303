"""Core ML packages (.mlpackage), for Apple's devices: a folder, converted everywhere and run on macOS only."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch.export import ExportedProgram

from localvit.exporters.registry import Format, register
from localvit.inference.export_metadata import Dynamic, ExportMetadata
from localvit.inference.quiet import without_messages


@register
@dataclass(frozen=True, kw_only=True)
class CoreML(Format):
    """Options of a Core ML package: an ML program in float32 for iOS 15, macOS 12 and later, of one image of one size.

    With `preprocessing` and uint8 its input is an image, as Vision and Xcode's preview give it. With `softmax`, and
    names of the classes that differ from each other, it is a classifier, which returns `classLabel` and the probability
    of each name, `classLabel_probs`. Otherwise it returns an array, `probabilities` or `logits`. The metadata is the
    model's user-defined metadata.
    """

    dynamic: Dynamic = "none"
    """Only `none`: the file takes one image."""

    name: ClassVar[str] = "coreml"
    suffix: ClassVar[str] = ".mlpackage"
    requires: ClassVar[tuple[str, ...]] = ("coremltools",)
    extra: ClassVar[str] = "coreml"
    opens_sides: ClassVar[bool] = False
    has_uint8: ClassVar[bool] = False
    is_folder: ClassVar[bool] = True

    def check_installed(self) -> None:
        with without_messages():
            super().check_installed()

    def write(self, program: ExportedProgram, path: Path, metadata: ExportMetadata) -> None:
        with without_messages():
            import coremltools

            model = coremltools.convert(
                program.run_decompositions({}),
                inputs=[_input(metadata)],
                outputs=[coremltools.TensorType(name=metadata.output)],
                classifier_config=_classifier(metadata),
                convert_to="mlprogram",
                minimum_deployment_target=coremltools.target.iOS15,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
            )
            model.short_description = f"{metadata.architecture}: {metadata.source}"
            model.version = metadata.versions.get("localvit", "")
            model.input_description["images"] = metadata.input_description
            model.user_defined_metadata.update(metadata.to_strings())
            model.save(str(path))
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # coremltools' own, for debugging
        for file in path.rglob("*"):  # some are readable by their owner only
            shutil.copymode(path if file.is_dir() else path / "Manifest.json", file)


def _input(metadata: ExportMetadata) -> Any:
    import coremltools

    shape = (1, 3, *metadata.preprocessing.input_size)
    if metadata.input_type == "uint8":
        return coremltools.ImageType(name="images", shape=shape, color_layout=coremltools.colorlayout.RGB)
    return coremltools.TensorType(name="images", shape=shape)


def _classifier(metadata: ExportMetadata) -> Any:
    """What makes the model a classifier, or None for one that returns an array."""
    import coremltools

    names = metadata.class_names
    if metadata.output != "probabilities" or names is None or len(set(names)) < len(names):
        return None
    return coremltools.ClassifierConfig(names, predicted_probabilities_output=metadata.output)
