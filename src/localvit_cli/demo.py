"""`python -m localvit_cli.demo`: train, evaluate and use a model from nothing, in a few minutes on two cores."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

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
        import json

        from localvit.data.datasets import default_digits_folder
        from localvit.train.config import TrainConfig, read_recipe
        from localvit.train.curves import draw_curves
        from localvit.train.state import BEST, LAST, LOG
        from localvit_cli.eval import Eval
        from localvit_cli.predict import Predict
        from localvit_cli.train import run_training

        for name in (LAST, BEST, LOG):
            (self.output_dir / name).unlink(missing_ok=True)
        digits = self.data_path or default_digits_folder()
        own = {"data_path": digits, "output_dir": self.output_dir, "seed": self.seed}
        run_training(TrainConfig.of(read_recipe("digits") | own))

        checkpoint, report = self.output_dir / LAST, self.output_dir / "report"
        curves = draw_curves(self.output_dir / LOG, self.output_dir / "curves.png", "LocalViT-nano on digits")
        Eval(model=str(checkpoint), data_set="DIGITS", data_path=digits, report=report).run()
        shown = [str(sorted((digits / "val" / str(digit)).iterdir())[0]) for digit in range(SHOWN)]
        Predict(model=str(checkpoint), paths=tuple(shown), topk=2).run()

        print(f"checkpoint: {checkpoint}\ncurves:     {curves}\nreport:     {report / 'report.html'}", flush=True)
        acc1 = json.loads((report / "results.json").read_text())["acc1"]
        if not acc1 >= EXPECTED_ACC1:
            raise RuntimeError(f"Acc@1 is {acc1:.3f} on the digits, where at least {EXPECTED_ACC1} is expected")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo as `arguments` say and return the exit status (see `localvit_cli.run`)."""
    from localvit_cli import run

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    demo = tyro.cli(
        Demo,
        prog="python -m localvit_cli.demo",
        args=[argument for argument in arguments if argument != "--debug"],
    )
    return run(demo.run, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
