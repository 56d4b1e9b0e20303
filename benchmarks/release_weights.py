"""A run's checkpoint as the file of weights that the package contains: small, and without the paths of a machine.

docs/models.md has the command. The raw weights are kept. Matrices and convolutions become bfloat16; vectors (biases,
norms and their running statistics), which are 4 % of the numbers, stay float32.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from localvit.checkpoints import HEADER, read_checkpoint
from localvit.checkpoints.contents import FORMAT
from localvit.models.published_names import RAW
from localvit.utils.files import atomic_write

MACHINE = ("data_path", "output_dir", "device", "workers", "wandb", "tensorboard", "finetune", "teacher_checkpoint")
"""Settings that say where a run happened, not what it computed."""


def release(source: Path, target: Path, texts: dict[str, str]) -> None:
    """Write the raw weights of `source` to `target`; `texts` replace or join what its header says of the run."""
    checkpoint = read_checkpoint(source)
    # The accuracy is measured on the new file and stated in the registry, once.
    about: dict[str, Any] = {
        key: value
        for key, value in checkpoint.about.items()
        if key not in ("held_out", "metrics", "test_images", "images_per_step")
    }
    about["config"] = {key: value for key, value in about["config"].items() if key not in MACHINE}
    header = {
        "format": FORMAT,
        "name": checkpoint.name,
        "args": checkpoint.args,
        "img_size": checkpoint.img_size,
        "class_names": checkpoint.class_names,
        "preprocessing": checkpoint.preprocessing,
        "about": about | texts,
    }
    tensors = {
        RAW + key: value.to(torch.bfloat16) if value.is_floating_point() and value.ndim > 1 else value
        for key, value in checkpoint.raw.items()
    }
    with atomic_write(target) as unfinished:
        safetensors.torch.save_file(tensors, unfinished, metadata={HEADER: json.dumps(header)})
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=TEXT", help="what the header says beside it")
    options = parser.parse_args()
    release(options.source, options.target, dict(text.split("=", 1) for text in options.text))
