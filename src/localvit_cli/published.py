"""The published program's command line: every flag by its published name, with its published default."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit_cli import UsageError, run

if TYPE_CHECKING:
    from localvit.train.config import TrainConfig

Flag = tyro.conf.FlagCreatePairsOff


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published LocalViT command line: trains, or evaluates with --eval, where training flags have no effect."""

    # Model
    model: str = "localvit_tiny_mlp4_act3_r192"
    """Name of the model."""
    input_size: int = 224
    """Side of the images in pixels."""
    drop: float = 0.0
    """Dropout rate."""
    drop_path: float = 0.1
    """Stochastic depth rate."""
    model_ema: bool = True
    """Average the weights."""
    model_ema_decay: float = 0.99996
    """Decay of the average."""
    model_ema_force_cpu: Annotated[bool, Flag] = False
    """Keep the average on the CPU."""

    # Data and evaluation
    data_path: Path | None = None
    """Folder of the data set."""
    data_set: Literal["CIFAR", "CIFAR10", "IMNET", "INAT", "INAT19", "FOLDER", "DIGITS"] = "IMNET"
    """Which data set; CIFAR is CIFAR-100."""
    inat_category: str = "name"
    """Level of the taxonomy of iNaturalist."""
    eval: Annotated[bool, Flag] = False
    """Evaluate only."""
    dist_eval: Annotated[bool, Flag] = False
    """Evaluate on all processes; exact here with or without."""
    resume: str = ""
    """Checkpoint, a file or an https address; to train, also auto, for the newest in --output_dir."""
    device: str = "cuda"
    """Device to run on; another one, with a warning, where there is none."""
    batch_size: int = 64
    """Images a batch and process."""
    num_workers: int = 10
    """Processes that prepare images, beside each that runs the model."""
    pin_mem: bool = True
    """Pin memory for the device; done here wherever it helps."""
    output_dir: str = ""
    """Where to save; without it runs/MODEL, where the published program would save nothing."""
    seed: int = 0
    """Seed."""
    start_epoch: int = 0
    """First epoch; only with --resume, and there the checkpoint's own epoch counts."""
    world_size: int = 1
    """Number of processes; torchrun's environment says it here."""
    dist_url: str = "env://"
    """How processes meet; torchrun's environment says it here."""
    local_rank: int | None = None
    """Which process of this machine; torch.distributed.launch gives it where --use_env is left out."""

    # Training
    epochs: int = 300
    """Epochs."""
    opt: str = "adamw"
    """Optimizer."""
    opt_eps: float = 1e-8
    """Optimizer's epsilon."""
    opt_betas: tuple[float, ...] = ()
    """Optimizer's betas."""
    clip_grad: float | None = None
    """Largest norm of all gradients together; without it they stay as they are."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.05
    """Weight decay."""
    sched: str = "cosine"
    """Learning rate schedule: cosine, tanh, step, multistep, poly or plateau."""
    lr: float = 5e-4
    """Learning rate for 512 images a step."""
    lr_noise: tuple[float, ...] = ()
    """Parts of the schedule, from 0 to 1, between which the learning rate is noisy."""
    lr_noise_pct: float = 0.67
    """Largest noise, as a part of the learning rate."""
    lr_noise_std: float = 1.0
    """Standard deviation of that noise."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: float = 1e-5
    """Learning rate that the schedule falls to."""
    decay_epochs: float = 30
    """Epochs between decays of a step schedule."""
    warmup_epochs: int = 5
    """Epochs of warm-up."""
    cooldown_epochs: int = 10
    """Epochs at the smallest learning rate after the last; no effect, as published: --epochs is when a run ends."""
    patience_epochs: int = 10
    """Epochs without a better Acc@1 before a plateau schedule falls."""
    decay_rate: Annotated[float, tyro.conf.arg(aliases=["--dr"])] = 0.1
    """Factor of a fall of the learning rate, or the power of poly."""
    color_jitter: float = 0.4
    """Color jitter; acts only without --aa."""
    aa: str = "rand-m9-mstd0.5-inc1"
    """timm's augmentation policy; none for none."""
    smoothing: float = 0.1
    """Label smoothing."""
    train_interpolation: str = "bicubic"
    """Filter for resizing while training: bicubic, bilinear or random."""
    repeated_aug: bool = True
    """Repeated augmentation."""
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: str = "pixel"
    """What random erasing fills with: pixel, rand or const."""
    recount: int = 1
    """Most regions that random erasing takes."""
    resplit: Annotated[bool, Flag] = False
    """Leave the first of each image's repeats unerased."""
    mixup: float = 0.8
    """Mixup's alpha."""
    cutmix: float = 1.0
    """CutMix's alpha."""
    cutmix_minmax: tuple[float, ...] = ()
    """Smallest and largest side of what CutMix pastes, as parts of the image's, instead of --cutmix."""
    mixup_prob: float = 1.0
    """Probability of mixing."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup."""
    mixup_mode: str = "batch"
    """Mix per batch, pair or elem."""
    teacher_model: str = "regnety_160"
    """Teacher of a distillation: timm's name or ours."""
    teacher_path: str = ""
    """Its checkpoint, a file or an https address; by default its released weights."""
    distillation_type: Literal["none", "soft", "hard"] = "none"
    """Kind of distillation."""
    distillation_alpha: float = 0.5
    """Weight of the distillation loss."""
    distillation_tau: float = 1.0
    """Temperature of soft distillation."""
    finetune: str = ""
    """Checkpoint to fine-tune from, a file or an https address, or a model's name for its released weights."""

    def run(self) -> int:
        """Train, or evaluate as the published program does, for any model with the one published preprocessing."""
        if self.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        return self._evaluate() if self.eval else self._train()

    def _train(self) -> int:
        if self.start_epoch and not self.resume:
            raise UsageError(
                f"--start_epoch {self.start_epoch} begins inside a schedule, which needs the state to go on from: give "
                "--resume FILE, whose own epoch then counts, or leave --start_epoch out"
            )
        from localvit_cli.console import say
        from localvit_cli.train import run_training

        if self.start_epoch:
            say(f"warning: --start_epoch {self.start_epoch} has no effect: {self.resume} says its own epoch")
        config = to_config(replace(self, finetune=_fetched(self.finetune), teacher_path=_fetched(self.teacher_path)))
        return run_training(config, resume=_fetched(self.resume) or None)

    def _evaluate(self) -> int:
        if not self.resume:
            raise UsageError("--eval needs --resume FILE, the checkpoint to evaluate")
        from localvit.data.preprocessing import Preprocessing
        from localvit.inference.runner import load_model
        from localvit_cli.eval import Eval, InferenceFlags, run_evaluation

        asked = Eval(
            model=self.model,
            checkpoint=Path(_fetched(self.resume)),
            data_path=self.data_path,
            data_set=self.data_set,
            inat_category=self.inat_category,
            input_size=(self.input_size,),
            running=InferenceFlags(device=self.device, batch_size=self.batch_size, workers=self.num_workers),
        )
        size = (self.input_size, self.input_size)
        ready = load_model(self.model, checkpoint=asked.checkpoint, input_size=size)
        run_evaluation(asked, replace(ready, preprocessing=Preprocessing.published(size)), asked.running.options())
        return 0


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
"""Settings of `TrainConfig` by the published flag that says them, where they are not called alike."""


def to_config(published: Published) -> "TrainConfig":
    """The training run that the published flags ask for. Raises UsageError, with the flag's name, for a bad value."""
    from localvit.train.config import TrainConfig

    settings = {each.name for each in fields(TrainConfig)}
    said = {RENAMED.get(each.name, each.name): getattr(published, each.name) for each in fields(published)}
    changed = {
        "input_size": (published.input_size,),
        "ema_decay": published.model_ema_decay if published.model_ema else None,
        "auto_augment": None if published.aa in ("", "none") else published.aa,
        "finetune": published.finetune or None,
        "teacher_checkpoint": published.teacher_path or None,
        "output_dir": published.output_dir or f"runs/{published.model}",
    }
    try:
        return TrainConfig.of({name: value for name, value in (said | changed).items() if name in settings})
    except ValueError as error:
        setting = str(error).partition("=")[0]
        flag = next((flag for flag, renamed in RENAMED.items() if renamed == setting), setting)
        raise UsageError(f"--{flag.replace('_', '-')}: {error}") from error


def _fetched(source: str) -> str:
    """A checkpoint as a file: an address is downloaded into timm's cache, anything else stays what it is.

    Raises RuntimeError, with the address, when it cannot be downloaded.
    """
    if not source.startswith(("https://", "http://")):
        return source
    from timm.models._hub import download_cached_file, get_cache_dir

    # A folder for each address, since the cache itself goes by the file's name alone.
    folder = get_cache_dir(hashlib.sha256(source.encode()).hexdigest()[:16])
    try:
        return str(download_cached_file(source, cache_dir=folder))
    except OSError as error:
        raise RuntimeError(
            f"could not download {source} ({error}): fetch it by other means and give the file"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the published command line and return the exit status (see `localvit_cli.run`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = [argument for argument in arguments if argument != "--debug"]
    return run(lambda: tyro.cli(Published, prog="main.py", args=given).run(), debug="--debug" in arguments)
