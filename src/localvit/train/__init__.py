"""Training: settings and recipes, what `build` makes of them, the loop `fit`, and the files of a run.

from localvit.train import TrainConfig, build, fit

config = TrainConfig(model="localvit_nano_patch4_32", data_set="DIGITS", epochs=10, output_dir="runs/digits")
training = build(config)
print(fit(training))
"""

from localvit.train.builder import Training, build
from localvit.train.config import TrainConfig
from localvit.train.loop import fit
from localvit.train.summary import RunResult

__all__ = ["RunResult", "TrainConfig", "Training", "build", "fit"]
