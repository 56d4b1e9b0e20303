"""onnxruntime-web, as npm fetches it: the version and the hashes are in `npm/package-lock.json`."""

import json
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

logger = logging.getLogger(__name__)

PACKAGE = "onnxruntime-web"


@dataclass(frozen=True, kw_only=True)
class WebRuntime:
    """The files of onnxruntime-web that a page needs."""

    version: str
    files: dict[str, Path]
    """By their names in the page: JavaScript modules, and the WebAssembly programs that they run."""


_CPU = {"ort.mjs": "ort.wasm.bundle.min.mjs", "ort.wasm": "ort-wasm-simd-threaded.wasm"}
_GPU = {"ort-gpu.mjs": "ort.webgpu.bundle.min.mjs", "ort-gpu.wasm": "ort-wasm-simd-threaded.asyncify.wasm"}


def web_runtime(*, webgpu: bool = False) -> WebRuntime:
    """onnxruntime-web from the user's cache, where npm puts it the first time.

    Args:
        webgpu: with the program that computes on the GPU, which lacks operators that resizing needs on the CPU.

    Raises RuntimeError, with what to do, if npm is missing or fails.
    """
    version = json.loads(_npm_files()["package.json"])["dependencies"][PACKAGE]
    folder = cache_folder() / f"{PACKAGE}-{version}"
    if not folder.is_dir():
        _fetch(folder, version)
    names = _CPU | _GPU if webgpu else _CPU
    return WebRuntime(version=version, files={name: folder / file for name, file in names.items()})


def cache_folder() -> Path:
    """This package's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localvit"


def _npm_files() -> dict[str, str]:
    npm = resources.files("localvit.web_page").joinpath("npm")
    return {name: npm.joinpath(name).read_text(encoding="utf-8") for name in ("package.json", "package-lock.json")}


def _fetch(folder: Path, version: str) -> None:
    """Have npm fetch the package and check its hash, and keep the needed files in `folder`, all or none."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"the page needs {PACKAGE} {version}, which npm fetches, and npm is not installed: install Node.js (such "
            f"as apt install npm), or copy the folder {folder} from a machine that has it"
        )
    logger.info(f"npm fetches {PACKAGE} {version}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        for name, text in _npm_files().items():
            Path(temporary, name).write_text(text, encoding="utf-8")
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"npm could not fetch {PACKAGE} {version} ({_reason(done.stderr)}): check the connection and npm's "
                f"settings, or copy the folder {folder} from a machine that has it"
            )
        kept = Path(temporary, "kept")
        kept.mkdir()
        for file in (_CPU | _GPU).values():
            shutil.copy(Path(temporary, "node_modules", PACKAGE, "dist", file), kept)
        try:
            kept.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has put it there meanwhile
                raise


def _reason(errors: str) -> str:
    """npm's error in one line."""
    lines = [line.removeprefix("npm error").strip() for line in errors.splitlines()]
    return "; ".join(line for line in lines if line and "log of this run" not in line)[:300] or "without a message"
