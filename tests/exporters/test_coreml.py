"""A Core ML package carries all it needs, is written whole, and claims no proof where it cannot run."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from exported_files import MEAN, NAMES, PREPROCESSING, STD, expected_probabilities, noise, tiny_model
from PIL import Image

import localvit
from localvit.exporters import CoreML, ExportReport
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.exported import ExportedModel
from localvit.inference.quiet import without_messages
from localvit.inference.runner import load_model
from localvit.utils.weight_files import CheckpointError
from localvit_cli import main

FLOAT16 = 10
"""In the specification of ML programs."""
on_macos = sys.platform == "darwin"
FILES = {"Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"}


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory) -> tuple[Path, ExportReport]:
    """The checkpoint as a package, over an older one."""
    with without_messages():
        pytest.importorskip("coremltools")
    path = tmp_path_factory.mktemp("coreml") / "tiny.mlpackage"
    path.mkdir()
    (path / "old").write_text("an older package")
    return path, localvit.export(checkpoint, path, CoreML())


def spec_of(path: Path):
    """The specification, read by coremltools."""
    import coremltools

    return coremltools.utils.load_spec(str(path))


def files_in(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def test_the_package_is_whole_and_stands_by_its_report(written):
    path, report = written
    assert files_in(path) == FILES
    assert {each.name for each in path.parent.iterdir()} == {"tiny.mlpackage", "tiny.mlpackage.json"}
    assert report.bytes == sum((path / name).stat().st_size for name in FILES)
    assert all((path / name).stat().st_mode & 0o044 for name in FILES)  # not for its owner only


@pytest.mark.skipif(on_macos, reason="Core ML runs here")
def test_where_it_cannot_run_the_report_claims_no_proof(written):
    path, report = written
    kept = json.loads(path.with_name("tiny.mlpackage.json").read_text())
    assert kept["not_run"] == report.not_run == "Core ML runs on macOS only"
    assert (kept["cases"], kept["max_rel"], kept["max_abs"], kept["top1_agreement"]) == ([], None, None, None)
    assert "NOT run beside the model: Core ML runs on macOS only" in str(report).splitlines()[0]
    assert "run by" not in str(report)


@pytest.mark.skipif(not on_macos, reason="Core ML runs on macOS only")
def test_where_it_can_run_it_computes_probabilities_of_pixels(written):
    path, report = written
    assert (report.not_run, report.max_rel < 1e-5) == ("", True)
    images = noise(1, 3, 24, 24)
    np.testing.assert_allclose(load_model(path).model.run(images), expected_probabilities(images), rtol=0, atol=1e-6)


def test_it_is_a_classifier_of_images_for_ios_15(written):
    path, _ = written
    spec = spec_of(path)
    description = spec.description
    assert spec.specificationVersion == 6  # iOS 15 and macOS 12
    [given] = description.input
    image = given.type.imageType
    assert (given.name, image.height, image.width) == ("images", 24, 24)
    assert image.ColorSpace.Name(image.colorSpace) == "RGB"
    assert description.predictedFeatureName == "classLabel"
    assert description.predictedProbabilitiesName == "classLabel_probs"
    assert {each.name for each in description.output} == {"classLabel", "classLabel_probs"}


def operations_of(spec) -> list:
    [block] = spec.mlProgram.functions["main"].block_specializations.values()
    return list(block.operations)


def test_it_normalizes_pixels_and_ends_with_the_softmax_and_the_names(written):
    path, _ = written
    operations = operations_of(spec_of(path))
    kinds = [operation.type for operation in operations if operation.type != "const"]
    assert kinds[:4] == ["mul", "sub", "mul", "conv"]  # to [0, 1], mean, std, and the patches
    assert kinds[-2:] == ["softmax", "classify"]
    [classes] = operations[-1].inputs["classes"].arguments
    values = classes.value.immediateValue.list.values
    assert [each.immediateValue.tensor.strings.values[0] for each in values] == NAMES
    types = {each.type.tensorType.dataType for operation in operations for each in operation.outputs}
    assert FLOAT16 not in types


def test_its_metadata_say_classes_preprocessing_and_origin(written):
    path, _ = written
    texts = spec_of(path).description.metadata.userDefined
    assert json.loads(texts["class_names"]) == NAMES
    preprocessing = json.loads(texts["preprocessing"])
    assert (preprocessing["mean"], preprocessing["std"]) == (list(MEAN), list(STD))
    assert (texts["output"], texts["dynamic"], texts["input_type"]) == ("probabilities", "none", "uint8")


def test_raw_takes_an_array_and_returns_logits(tmp_path):
    with without_messages():
        pytest.importorskip("coremltools")
    path = tmp_path / "raw.mlpackage"
    localvit.export(tiny_model(), path, CoreML(include=()), preprocessing=PREPROCESSING, class_names=NAMES)
    description = spec_of(path).description
    [given], [output] = description.input, description.output
    assert (given.name, list(given.type.multiArrayType.shape)) == ("images", [1, 3, 24, 24])
    assert (output.name, description.predictedFeatureName) == ("logits", "")


@dataclass(frozen=True, kw_only=True)
class DiesHalfway(CoreML):
    """A format that fails when a part of the folder is written."""

    name: ClassVar[str] = "dies"
    requires: ClassVar[tuple[str, ...]] = ()

    def write(self, program, path: Path, metadata: ExportMetadata) -> None:
        path.mkdir()
        (path / "Manifest.json").write_text("{")
        raise RuntimeError("no conversion")


def test_an_older_package_stays_if_the_conversion_fails(tmp_path):
    path = tmp_path / "model.mlpackage"
    path.mkdir()
    (path / "Manifest.json").write_text("an older package")
    with pytest.raises(RuntimeError, match="no conversion"):
        localvit.export(tiny_model(), path, DiesHalfway(), preprocessing=PREPROCESSING)
    assert [each.name for each in tmp_path.iterdir()] == ["model.mlpackage"]
    assert (path / "Manifest.json").read_text() == "an older package"


def test_a_file_is_not_replaced_by_a_folder(checkpoint, tmp_path):
    path = tmp_path / "model.mlpackage"
    path.write_text("a file")
    with pytest.raises(OSError, match="it is a file, and a folder is to be written"):
        localvit.export(checkpoint, path, DiesHalfway())
    assert path.read_text() == "a file"


def test_info_reads_it_everywhere(written, capsys):
    path, report = written
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["class_names"], facts["input_shape"]) == (NAMES, [1, 3, 24, 24])
    assert (facts["sha256"], facts["bytes"]) == (report.sha256, report.bytes)
    assert facts["runtime"] == "Core ML, specification 6"


@pytest.mark.skipif(on_macos, reason="Core ML runs here")
def test_running_it_is_one_line_where_it_cannot_run(written, tmp_path, capsys):
    path, _ = written
    Image.fromarray(noise(30, 30, 3)).save(tmp_path / "image.png")
    for command in (["predict", str(path), str(tmp_path)], ["bench", str(path)]):
        assert main(command) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(f"{path} cannot be run here: Core ML runs on macOS only")


def test_what_is_not_a_package_is_one_error(written, tmp_path):
    path, _ = written
    model = tmp_path / "model.mlpackage"
    model.write_bytes(b"a file")
    with pytest.raises(CheckpointError, match="is a file, and \\.mlpackage is a folder"):
        ExportedModel.open(model)
    model.unlink()
    model.mkdir()
    with pytest.raises(CheckpointError, match="is not a Core ML file or is damaged"):
        ExportedModel.open(model)
    (model / "Manifest.json").write_bytes((path / "Manifest.json").read_bytes())
    with pytest.raises(CheckpointError, match="is not a Core ML file or is damaged"):
        ExportedModel.open(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dynamic", "batch"], "dynamic='batch' is not written as coreml"),
        (["--include", "resize"], "include='resize' is not written as coreml"),
        (["--precision", "float16"], "precision='float16' is not written as coreml"),
        (["--output", "model.mlmodel"], "must end in .mlpackage"),
    ],
)
def test_what_it_cannot_be_is_one_line(checkpoint, options, words, capsys):
    assert main(["export", str(checkpoint), "--format", "coreml", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_without_the_package_one_line_says_what_to_install(checkpoint, tmp_path, capsys, monkeypatch):
    for module in ("coremltools", "coremltools.models"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    path = tmp_path / "model.mlpackage"
    assert main(["export", str(checkpoint), "--format", "coreml", "--output", str(path)]) == 1
    path.mkdir()
    assert main(["info", str(path)]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert 'pip install "localvit[coreml]"' in line
