"""The embedded data set: scikit-learn's handwritten digits as a folder of images, available without a download."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from localvit.data.images import DataError

SPLIT_SEED = 0
VAL_FRACTION = 0.2
SIZE = 32


def write_digits(root: Path) -> Path:
    """Write the 1,797 digits (UCI optical recognition of handwritten digits) as an ImageFolder, unless it exists.

    The 8 x 8 gray values from 0 to 16 become 32 x 32 PNG files (nearest neighbor: each value is a 4 x 4 square) in
    `root/{train,val}/<digit>/`. The split is stratified and fixed: 1,437 training and 360 validation images. The folder
    is created atomically.

    Returns:
        `root`.

    Raises:
        DataError: scikit-learn, which contains the images, is not installed, or `root` contains something else.
    """
    if (root / "val").is_dir():
        return root
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise DataError(
            f"{root} contains something else than the digits: give a folder that is empty or does not exist"
        )
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError('the embedded digits are part of scikit-learn: pip install "localvit[digits]"') from error
    digits = load_digits()
    train, val = train_test_split(
        np.arange(len(digits.target)), test_size=VAL_FRACTION, stratify=digits.target, random_state=SPLIT_SEED
    )
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for split, indices in (("train", train), ("val", val)):
            for index in sorted(indices):
                folder = unfinished / split / str(digits.target[index])
                folder.mkdir(parents=True, exist_ok=True)
                gray = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
                Image.fromarray(gray).resize((SIZE, SIZE), Image.Resampling.NEAREST).save(folder / f"{index:04d}.png")
        unfinished.chmod(0o755)
        unfinished.rename(root)
    except OSError:
        if not (root / "val").is_dir():  # otherwise another process has written it meanwhile
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root
