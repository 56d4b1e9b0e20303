"""The published program's command line: every flag by its published name, with its published default."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

Flag = tyro.conf.FlagCreatePairsOff


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published LocalViT command line. Flags that only train have no effect on --eval."""

    # Model
    model: str = "localvit_tiny_mlp4_act3_r192"
    """Name of the model."""
    input_size: int = 224
    """Side of the pictures in pixels."""
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
    """Checkpoint, a file or an https address."""
    device: str = "cuda"
    """Device to run on."""
    batch_size: int = 64
    """Pictures a batch and process."""
    num_workers: int = 10
    """Processes that decode pictures."""
    pin_mem: bool = True
    """Pin memory for the device; done here wherever it helps."""
    output_dir: str = ""
    """Where to save."""
    seed: int = 0
    """Seed."""
    start_epoch: int = 0
    """First epoch."""
    world_size: int = 1
    """Number of processes; torchrun's environment says it here."""
    dist_url: str = "env://"
    """How processes meet; torchrun's environment says it here."""

    # Training
    epochs: int = 300
    """Epochs."""
    opt: str = "adamw"
    """Optimiser."""
    opt_eps: float = 1e-8
    """Optimiser's epsilon."""
    opt_betas: tuple[float, ...] = ()
    """Optimiser's betas."""
    clip_grad: float | None = None
    """Largest gradient norm."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.05
    """Weight decay."""
    sched: str = "cosine"
    """Learning rate schedule."""
    lr: float = 5e-4
    """Learning rate for 512 pictures a step."""
    lr_noise: tuple[float, ...] = ()
    """Range of epochs with a noisy learning rate."""
    lr_noise_pct: float = 0.67
    """Limit of that noise."""
    lr_noise_std: float = 1.0
    """Deviation of that noise."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: float = 1e-5
    """Smallest learning rate."""
    decay_epochs: float = 30
    """Epochs between decays of a step schedule."""
    warmup_epochs: int = 5
    """Epochs of warm-up."""
    cooldown_epochs: int = 10
    """Epochs at the smallest learning rate."""
    patience_epochs: int = 10
    """Patience of a plateau schedule."""
    decay_rate: Annotated[float, tyro.conf.arg(aliases=["--dr"])] = 0.1
    """Decay of the learning rate."""
    color_jitter: float = 0.4
    """Colour jitter."""
    aa: str = "rand-m9-mstd0.5-inc1"
    """Automatic augmentation policy."""
    smoothing: float = 0.1
    """Label smoothing."""
    train_interpolation: str = "bicubic"
    """Filter for resizing while training."""
    repeated_aug: bool = True
    """Repeated augmentation."""
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: str = "pixel"
    """What random erasing fills with."""
    recount: int = 1
    """Regions that random erasing takes."""
    resplit: Annotated[bool, Flag] = False
    """Leave the first augmentation split unerased."""
    mixup: float = 0.8
    """Mixup's alpha."""
    cutmix: float = 1.0
    """CutMix's alpha."""
    cutmix_minmax: tuple[float, ...] = ()
    """Smallest and largest ratio of CutMix."""
    mixup_prob: float = 1.0
    """Probability of mixing."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup."""
    mixup_mode: str = "batch"
    """Mix per batch, pair or elem."""
    teacher_model: str = "regnety_160"
    """Teacher of a distillation."""
    teacher_path: str = ""
    """Its checkpoint."""
    distillation_type: Literal["none", "soft", "hard"] = "none"
    """Kind of distillation."""
    distillation_alpha: float = 0.5
    """Weight of the distillation loss."""
    distillation_tau: float = 1.0
    """Temperature of soft distillation."""
    finetune: str = ""
    """Checkpoint to fine-tune from."""

    def run(self) -> None:
        """Evaluate as the published program does, for any model with the one published preprocessing."""
        if not self.eval:
            raise ValueError(
                "this version trains through `localvit train` only; the published training flags are not taken yet"
                f"{self._given()}: add --eval to evaluate"
            )
        if not self.resume:
            raise ValueError("--eval needs --resume FILE, the checkpoint to evaluate")
        from dataclasses import replace

        from localvit.data.preprocessing import Preprocessing
        from localvit.inference import ready_model
        from localvit_cli.eval import Eval, Running, run_evaluation

        asked = Eval(
            model=self.model,
            checkpoint=_fetched(self.resume),
            data_path=self.data_path,
            data_set=self.data_set,
            inat_category=self.inat_category,
            input_size=(self.input_size,),
            running=Running(device=self.device, batch_size=self.batch_size, workers=self.num_workers),
        )
        size = (self.input_size, self.input_size)
        ready = ready_model(self.model, checkpoint=asked.checkpoint, input_size=size)
        run_evaluation(asked, replace(ready, preprocessing=Preprocessing.published(size)), asked.running.options())

    def _given(self) -> str:
        """The flags whose values are not the defaults, for an error message."""
        given = [
            f"--{field.name.replace('_', '-')}" for field in fields(self) if getattr(self, field.name) != field.default
        ]
        return f" ({', '.join(given)})" if given else ""


def _fetched(resume: str) -> Path:
    """The checkpoint as a file; an address is downloaded into timm's cache."""
    if resume.startswith(("https://", "http://")):
        from timm.models._hub import download_cached_file

        return Path(download_cached_file(resume))
    return Path(resume)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the published command line and return the exit status (see `localvit_cli.run`)."""
    from localvit_cli import run

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = [argument for argument in arguments if argument != "--debug"]
    return run(lambda: tyro.cli(Published, prog="main.py", args=given).run(), debug="--debug" in arguments)
