"""Writing the page: its scripts, the model and onnxruntime-web, as files that a browser opens from a disk."""

import base64
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import jinja2

from localvit.data.classes import readable_class_names
from localvit.exporters import Onnx, export
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.exported import ExportedModel, is_exported_path
from localvit.utils.version import VERSION
from localvit.web_page.resizer import write_resizer
from localvit.web_page.vendored import PACKAGE, WebRuntime, web_runtime

logger = logging.getLogger(__name__)

INDEX = "index.html"
_SCRIPTS = ("files.js", "model_thread.js", "camera.js", "page.js")
_WORKER = ("header.js", "pixels.js", "worker.js")
"""Scripts of the model's thread, which are joined to one: a page opened from a disk may not load them there."""
_CARRIED = "carried"
"""Folder of the scripts that carry the files which would have to be fetched."""
_PART = 3 << 18
"""Bytes of a carried file in each of its parts; a multiple of 3, which base64 encodes without filling up."""


def write_page(model: str | Path, folder: str | Path, *, webgpu: bool = False) -> Path:
    """Write a page that classifies images in the browser. It needs no server and makes no requests.

    Args:
        model: a checkpoint, a model's name (with its released weights), or an .onnx file that `localvit.export` wrote.
        folder: folder to write, new or empty or with an earlier page, which is replaced.
        webgpu: offer a choice to compute on the GPU. The page is 36 MB larger.

    Returns:
        The page's index.html. A browser opens it from the disk, or from any server of files.

    Raises:
        FileExistsError: the folder contains something else.
        ValueError: the model's preprocessing, or what the file includes, does not suit the page.
        RuntimeError: npm, which fetches onnxruntime-web, is missing or fails.
        ImportError: a package is missing that exports the model, with what to install.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    _check_free(folder)
    Onnx().check_installed()
    runtime = web_runtime(webgpu=webgpu)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary, "page")
        unfinished.mkdir()
        exported = _exported(model, Path(temporary, "model.onnx"))
        resizer = Path(temporary, "resizer.onnx")
        write_resizer(exported.metadata.preprocessing, resizer)
        _write_files(unfinished, exported, resizer, runtime, webgpu=webgpu)
        _put_in_place(unfinished, folder)
    return folder / INDEX


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give the path of a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    index = folder / INDEX
    if not (index.is_file() and '<meta name="generator" content="localvit' in index.read_text(errors="replace")):
        raise FileExistsError(f"{folder} contains something else than a page of localvit: give another folder")


def _exported(model: str | Path, path: Path) -> ExportedModel:
    """The model as an .onnx file: the given one, or a new one at `path`. Raises ValueError for an unsuitable one."""
    if is_exported_path(model):
        path = Path(model)
        if path.suffix != ".onnx":
            raise ValueError(f"{path} cannot run in a browser: give an .onnx file, or the checkpoint")
    else:
        logger.info(str(export(model, path, Onnx(dynamic="none"))).replace(str(path), str(model)))
    exported = ExportedModel.open(path)
    if "preprocessing" not in exported.metadata.in_graph:
        raise ValueError(f"{path} takes normalized images: export the checkpoint without --raw")
    return exported


def _write_files(folder: Path, exported: ExportedModel, resizer: Path, runtime: WebRuntime, *, webgpu: bool) -> None:
    static = resources.files("localvit.web_page").joinpath("static")
    for name in _SCRIPTS:
        (folder / name).write_bytes(static.joinpath(name).read_bytes())
    base = resources.files("localvit.evaluation.report").joinpath("base.css")
    (folder / "page.css").write_text(_text(base) + "\n" + _text(static.joinpath("page.css")), encoding="utf-8")
    worker = "\n".join(_text(static.joinpath(name)) for name in _WORKER)
    carried = {
        "worker.js": worker.encode(),
        **{name: path.read_bytes() for name, path in runtime.files.items()},
        "resizer.onnx": resizer.read_bytes(),
        "model.onnx": exported.path.read_bytes(),
    }
    (folder / _CARRIED).mkdir()
    for name, content in carried.items():
        with (folder / _CARRIED / f"{name}.js").open("w", encoding="ascii") as stream:
            stream.writelines(_carrying_script(name, content))
    metadata = exported.metadata
    scripts = [_SCRIPTS[0], *(f"{_CARRIED}/{name}.js" for name in carried), *_SCRIPTS[1:]]
    page = (
        _environment()
        .get_template(f"{INDEX}.jinja")
        .render(
            title=f"Image classification with {metadata.architecture}",
            version=VERSION,
            settings=_settings(metadata),
            about=_about(metadata, runtime, len(carried["model.onnx"])),
            webgpu=webgpu,
            scripts=scripts,
        )
    )
    (folder / INDEX).write_text(page, encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("localvit.web_page", "static"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _text(file: Traversable) -> str:
    return file.read_text(encoding="utf-8")


def _carrying_script(name: str, content: bytes) -> Iterator[str]:
    """A script that hands a file to the page, in parts."""
    yield f"carry({json.dumps(name)}, [\n"
    for start in range(0, len(content), _PART):
        yield f'"{base64.b64encode(content[start : start + _PART]).decode()}",\n'
    yield "]);\n"


def _settings(metadata: ExportMetadata) -> dict[str, Any]:
    """What the scripts need to know of the model."""
    return {
        "classNames": readable_class_names(metadata.class_names, metadata.num_classes),
        "inputSize": list(metadata.preprocessing.input_size),
        "inputType": metadata.input_type,
        "output": metadata.output,
        "resizesItself": "resize" in metadata.in_graph,
        "gpu": False,
    }


def _about(metadata: ExportMetadata, runtime: WebRuntime, size: int) -> list[tuple[str, str]]:
    names = readable_class_names(metadata.class_names, metadata.num_classes)
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return [
        ("Model", f"{metadata.architecture}, {size / 1e6:.1f} MB"),
        ("Classes", f"{metadata.num_classes:,}: {shown}"),
        ("Images are", f"resized and cropped to {metadata.preprocessing}"),
        ("Made from", metadata.source),
        ("Runs in", f"{PACKAGE} {runtime.version} (Microsoft, MIT license)"),
        ("Written by", f"localvit {VERSION}"),
    ]


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Move the files to their folder, instead of those of an earlier page, the page itself last."""
    folder.mkdir(exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == INDEX):
        target = folder / file.name
        if target.is_dir():
            shutil.rmtree(target)
        file.replace(target)
