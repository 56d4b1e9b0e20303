"""`localvit demo`: train, evaluate and use a small model, in a few minutes on two cores; or a model as a web page."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from localvit.data.datasets import default_digits_folder
from localvit.train.config import TrainConfig
from localvit.train.recipe import read_recipe, read_settings
from localvit.train.run_folder import CONFIG, LAST, contains_run, remove_run
from localvit.train.trackers import CURVES
from localvit_cli import UsageError
from localvit_cli.eval import Eval
from localvit_cli.predict import Predict
from localvit_cli.streams import printable
from localvit_cli.train import run_training
from localvit_cli.tyro_rules import optional

EXPECTED_ACC1 = 97.0
"""Accuracy in percent that every seed reaches with a margin. A lower one means that something is broken."""
NUM_PREDICTIONS = 5
PACKAGED = "localvit_nano_patch4_32"
"""A model whose trained weights are in this package."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small LocalViT on handwritten digits, evaluate it and predict.

    With --web, write a web page that classifies images instead.
    """

    output_dir: Path = Path("runs/demo")
    """Folder for the checkpoint, the curves and the report. Files of an earlier demo there are replaced."""
    data_path: Annotated[Path | None, optional("DIR", "the user's cache")] = None
    """Folder to write the digits to."""
    seed: int = 0
    """Seed of the run."""
    web: Annotated[Path | None, optional("DIR")] = None
    """Instead of training, write a page to this folder that classifies images in the browser, without a server."""
    model: Annotated[str | None, optional("FILE", f"with --web {PACKAGED}")] = None
    """The page's model: a checkpoint, a name, or an .onnx file of localvit export."""
    webgpu: bool = False
    """Let the page offer to compute on the GPU. It is 36 MB larger."""

    def run(self) -> None:
        """Run the demo. Raises RuntimeError if the accuracy is lower than expected, and SystemExit as `run_demo`."""
        if self.web is not None:
            self._write_page(self.web)
            return
        if self.model is not None or self.webgpu:
            raise UsageError(f"--{'webgpu' if self.webgpu else 'model'} has no effect without --web DIR")
        # The number of threads affects rounding. With one, a seed gives the same result on any number of cores.
        torch.set_num_threads(1)
        data_path = self.data_path or default_digits_folder()
        own = {"data_path": data_path, "output_dir": self.output_dir, "seed": self.seed}
        acc1 = run_demo(TrainConfig(**read_recipe("digits") | own))
        if not acc1 >= EXPECTED_ACC1:
            raise RuntimeError(f"Acc@1 on the digits is {acc1:.3f}; at least {EXPECTED_ACC1} is expected")

    def _write_page(self, folder: Path) -> None:
        from localvit.web_page import write_page

        trained = Demo()
        for name in ("output_dir", "data_path", "seed"):
            if getattr(self, name) != getattr(trained, name):
                raise UsageError(f"--{name.replace('_', '-')} has no effect with --web, which trains nothing")
        page = write_page(self.model or PACKAGED, folder, webgpu=self.webgpu)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(printable(f"{page}: {size / 1e6:.0f} MB with its files; open it in a browser"), flush=True)


def run_demo(config: TrainConfig) -> float:
    """Train on digits, evaluate the last checkpoint, predict with it, and print where the files are. Returns Acc@1.

    Raises FileExistsError if the output folder contains a run that is not an earlier demo, and SystemExit, with the
    status of the training, if a signal stopped it.
    """
    assert config.data_path is not None
    if contains_run(config.output_dir) and not _is_demo(config):
        raise FileExistsError(f"{config.output_dir} contains another run than a demo: choose another --output-dir")
    remove_run(config.output_dir)
    if status := run_training(config):
        raise SystemExit(status)

    checkpoint, report = config.output_dir / LAST, config.output_dir / "report"
    Eval(model=str(checkpoint), data_set="DIGITS", data_path=config.data_path, report=report).run()
    classes = range(NUM_PREDICTIONS)
    images = [str(min((config.data_path / "val" / str(digit)).iterdir())) for digit in classes]
    Predict(model=str(checkpoint), paths=tuple(images), topk=2).run()
    files = {"checkpoint": checkpoint, "curves": config.output_dir / CURVES, "report": report / "report.html"}
    lines = [printable(f"{name + ':':11} {path}") for name, path in files.items() if path.exists()]
    print("\n".join(lines))
    print(f"For a photograph, with a model that is trained already: localvit predict {PACKAGED} PHOTO", flush=True)
    return json.loads((report / "results.json").read_text())["acc1"]


def _is_demo(config: TrainConfig) -> bool:
    """Whether the run in the output folder is a demo, with these settings."""
    path = config.output_dir / CONFIG
    found = read_settings(path) if path.exists() else {}
    own = ("output_dir", "data_path", "seed")
    return all(found.get(name) == value for name, value in config.to_dict().items() if name not in own)
