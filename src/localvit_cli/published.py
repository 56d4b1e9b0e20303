"""The published program's command line: each flag under its published name, with its published default.

Flags that are settings of `TrainConfig` take their type, range, default and help from there. The tables below list
their names, and only what differs.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from timm.models._hub import download_cached_file, get_cache_dir

from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import load_model
from localvit.train.config import TrainConfig
from localvit.train.recipe import describe_errors
from localvit.train.run_folder import states
from localvit.utils.devices import cpu_cores
from localvit_cli import UsageError, run
from localvit_cli.eval import Eval, InferenceFlags, run_evaluation
from localvit_cli.train import run_training
from localvit_cli.tyro_rules import REGISTRY

logger = logging.getLogger(__name__)

Flag = tyro.conf.FlagCreatePairsOff

SAME_NAME = (
    *("model", "input_size", "data_path", "data_set", "inat_category", "device", "batch_size", "output_dir", "seed"),
    *("epochs", "opt", "opt_eps", "opt_betas", "clip_grad", "momentum", "weight_decay", "sched", "lr", "lr_noise"),
    *("lr_noise_pct", "lr_noise_std", "warmup_lr", "min_lr", "decay_epochs", "warmup_epochs", "patience_epochs"),
    *("decay_rate", "color_jitter", "repeated_aug", "resplit", "mixup", "cutmix", "cutmix_minmax", "mixup_prob"),
    *("mixup_switch_prob", "mixup_mode", "distillation_alpha", "distillation_tau", "finetune"),
)
"""Published flags with the same name as the setting."""
RENAMED = {
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "model_ema_decay": "ema_decay",
    "model_ema_force_cpu": "ema_on_cpu",
    "num_workers": "workers",
    "aa": "auto_augment",
    "smoothing": "label_smoothing",
    "train_interpolation": "interpolation",
    "reprob": "random_erasing",
    "remode": "random_erasing_mode",
    "recount": "random_erasing_count",
    "teacher_model": "teacher",
    "teacher_path": "teacher_checkpoint",
    "distillation_type": "distillation",
}
"""The setting for each published flag with another name."""
SETTING_OF = {name: name for name in SAME_NAME} | RENAMED
DEFAULTS: dict[str, Any] = {
    "model": "localvit_tiny_mlp4_act3_r192",
    "input_size": 224,
    "batch_size": 64,
    "device": "cuda",
    "num_workers": 10,
    "output_dir": "",
    "teacher_path": "",
}
"""Defaults that differ from those of the settings."""
TYPES: dict[str, Any] = {
    "input_size": int,
    "data_set": Literal["CIFAR", "CIFAR10", "IMNET", "INAT", "INAT19", "FOLDER", "DIGITS"],
    "output_dir": str,
    "teacher_path": str,
    "decay_rate": Annotated[float, tyro.conf.arg(aliases=["--dr"])],
}
"""Types that differ from those of the settings."""
HELP = {
    "input_size": "Side of the images in pixels.",
    "data_set": "The data set. CIFAR is CIFAR-100.",
    "output_dir": "Output folder. Default: runs/MODEL, where the published program would save nothing.",
    "finetune": "Initial weights: a checkpoint (file or https address), or the name of a model with released weights.",
    "teacher_path": "Checkpoint of the teacher (file or https address). Default: its released weights.",
}
"""Help that differs from that of the settings."""


class _ProgramFlags(BaseModel):
    """Train, or evaluate with --eval (training flags then have no effect), as the published LocalViT program does."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    eval: Annotated[bool, Flag] = False
    """Only evaluate the checkpoint --resume."""
    dist_eval: Annotated[bool, Flag] = False
    """No effect: evaluation is always exact and uses all processes."""
    resume: str = ""
    """Checkpoint, a file or an https address. For training also auto, the newest checkpoint in --output_dir."""
    start_epoch: int = 0
    """No effect: with --resume, the epoch of the checkpoint is used."""
    model_ema: bool = True
    """Keep a moving average of the weights."""
    cooldown_epochs: int = 10
    """No effect, as in the published program: a run ends after --epochs."""
    pin_mem: bool = True
    """No effect: memory is pinned if it is useful."""
    world_size: int = 1
    """No effect: torchrun sets the number of processes."""
    dist_url: str = "env://"
    """No effect: torchrun sets the address."""
    local_rank: int | None = None
    """Rank of the process on this machine. Set by torch.distributed.launch without --use_env."""

    def run(self) -> int:
        """Train or evaluate, for any model, with the published preprocessing. Returns the exit status."""
        if self.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        return self._evaluate() if self.eval else self._train()

    def _train(self) -> int:
        if self.start_epoch and not self.resume:
            raise UsageError(
                f"--start_epoch {self.start_epoch} needs --resume FILE to restore the state of the training, whose "
                "epoch is then used; or leave --start_epoch out"
            )
        if self.start_epoch:
            logger.warning(f"--start_epoch {self.start_epoch} has no effect: the epoch of {self.resume} is used")
        flags = self.model_dump()
        if self.resume and (self.resume != "auto" or states(to_config(self).output_dir)):
            flags["finetune"] = ""  # the checkpoint has the weights
        downloaded = {name: _download(flags[name]) for name in ("finetune", "teacher_path")}
        changed = {**downloaded, "num_workers": self._workers()}
        return run_training(to_config(self.model_copy(update=changed)), resume=_download(self.resume) or None)

    def _workers(self) -> int:
        """The number of workers. The published default is limited to the cores that there are; more only wait."""
        workers = self.model_dump()["num_workers"]
        return min(workers, cpu_cores()) if workers == DEFAULTS["num_workers"] else workers

    def _evaluate(self) -> int:
        if not self.resume:
            raise UsageError("--eval needs --resume FILE, the checkpoint to evaluate")
        flags = self.model_dump()
        device, batch_size, workers = flags["device"], flags["batch_size"], self._workers()
        evaluation = Eval(
            model=flags["model"],
            checkpoint=Path(str(_download(self.resume))),
            data_path=flags["data_path"],
            data_set=flags["data_set"],
            inat_category=flags["inat_category"],
            input_size=(flags["input_size"],),
            running=InferenceFlags(device=device, batch_size=batch_size, workers=workers),
        )
        size = (flags["input_size"], flags["input_size"])
        ready = load_model(flags["model"], checkpoint=evaluation.checkpoint, input_size=size)
        published = replace(ready, preprocessing=Preprocessing.published(size))
        run_evaluation(evaluation, published, evaluation.running.options())
        return 0


def _field_of(flag: str, setting: str) -> Any:
    """Type and default of a published flag, for pydantic."""
    field = TrainConfig.model_fields[setting]
    default = DEFAULTS.get(flag, field.default)
    kind = TYPES.get(flag, field.annotation)
    metadata = [] if flag in TYPES else [*field.metadata, *([Flag] if default is False else [])]
    for each in metadata:
        kind = Annotated[kind, each]
    return kind, Field(default=default, description=HELP.get(flag, field.description))


Published: type[_ProgramFlags] = create_model(
    "Published",
    __base__=_ProgramFlags,
    __doc__=_ProgramFlags.__doc__,
    **{flag: _field_of(flag, setting) for flag, setting in SETTING_OF.items()},
)
"""The published command line."""


def to_config(published: _ProgramFlags) -> TrainConfig:
    """The settings for the published flags. Raises UsageError with the flags' names for bad values."""
    flags = published.model_dump()
    settings = {setting: flags[flag] for flag, setting in SETTING_OF.items()}
    settings |= {
        "input_size": (flags["input_size"],),
        "ema_decay": flags["model_ema_decay"] if published.model_ema else None,
        "auto_augment": None if flags["aa"] in ("", "none") else flags["aa"],
        "finetune": flags["finetune"] or None,
        "teacher_checkpoint": flags["teacher_path"] or None,
        "output_dir": flags["output_dir"] or f"runs/{flags['model']}",
    }
    try:
        return TrainConfig(**settings)
    except ValidationError as error:
        flag_of = {setting: flag.replace("_", "-") for flag, setting in SETTING_OF.items()}
        lines = [(line.partition("=")[0].partition("[")[0], line) for line in describe_errors(error).splitlines()]
        raise UsageError("\n".join(f"--{flag_of.get(setting, setting)}: {line}" for setting, line in lines)) from error


def _download(source: str | None) -> str | None:
    """The path of a checkpoint. An address is downloaded to timm's cache; anything else is returned unchanged.

    Raises RuntimeError with the address if the download fails.
    """
    if source is None or not source.startswith(("https://", "http://")):
        return source
    # The cache uses only the file's name, so each address gets its own folder.
    folder = get_cache_dir(hashlib.sha256(source.encode()).hexdigest()[:16])
    try:
        return str(download_cached_file(source, cache_dir=folder))
    except OSError as error:
        raise RuntimeError(
            f"could not download {source} ({error}): download it in another way, and give the file instead"
        ) from error


def parse(arguments: Sequence[str]) -> _ProgramFlags:
    """The published flags. Raises SystemExit for --help or flags that cannot be read."""
    return tyro.cli(Published, prog="main.py", args=list(arguments), registry=REGISTRY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the published command line and return the exit status (see `localvit_cli.run`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = [argument for argument in arguments if argument != "--debug"]
    return run(lambda: parse(given).run(), debug="--debug" in arguments)
