"""`localvit demo`: train, evaluate and use a model from nothing, in a few minutes on two cores."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localvit.train.config import TrainConfig

EXPECTED_ACC1 = 97.0
"""Accuracy in percent that any seed reaches with a margin; less means that something is broken."""
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small LocalViT on handwritten digits, evaluate it, and predict a few of them."""

    output_dir: Path = Path("runs/demo")
    """Folder of the checkpoint, the curves and the report; a demo's earlier files there are replaced."""
    data_path: Path | None = None
    """Folder that the digits are written to; by default the user's cache."""
    seed: int = 0
    """What the run follows from."""

    def run(self) -> None:
        """Run it. Raises RuntimeError when the accuracy is less than expected."""
        import torch

        from localvit.data.datasets import default_digits_folder
        from localvit.train.config import TrainConfig
        from localvit.train.settings import read_recipe

        # How sums are split over threads changes their rounding; with one, a seed gives the same bits on any number of
        # cores.
        torch.set_num_threads(1)
        own = {"data_path": self.data_path or default_digits_folder(), "output_dir": self.output_dir, "seed": self.seed}
        acc1 = run_demo(TrainConfig.of(read_recipe("digits") | own))
        if not acc1 >= EXPECTED_ACC1:
            raise RuntimeError(f"Acc@1 is {acc1:.3f} on the digits, where at least {EXPECTED_ACC1} is expected")


def run_demo(config: "TrainConfig") -> float:
    """Train on digits as told, evaluate the last checkpoint, predict with it, say where it all is; returns Acc@1."""
    import json

    from localvit.train.run_folder import BEST, LAST, LOG, STATE
    from localvit.train.trackers import CURVES
    from localvit_cli.eval import Eval
    from localvit_cli.predict import Predict
    from localvit_cli.train import run_training

    assert config.data_path is not None
    for name in (LAST, BEST, LOG, STATE):
        (config.output_dir / name).unlink(missing_ok=True)
    run_training(config)

    checkpoint, report = config.output_dir / LAST, config.output_dir / "report"
    Eval(model=str(checkpoint), data_set="DIGITS", data_path=config.data_path, report=report).run()
    shown = [str(min((config.data_path / "val" / str(digit)).iterdir())) for digit in range(SHOWN)]
    Predict(model=str(checkpoint), paths=tuple(shown), topk=2).run()
    curves = config.output_dir / CURVES
    print(f"checkpoint: {checkpoint}\ncurves:     {curves}\nreport:     {report / 'report.html'}", flush=True)
    return json.loads((report / "results.json").read_text())["acc1"]
