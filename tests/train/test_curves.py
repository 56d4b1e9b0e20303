"""The picture of a run's curves."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from localvit.train.curves import draw_curves

ROW = {"train_lr": 1e-3, "train_loss": 1.5, "test_loss": 1.25, "test_acc1": 60.0, "test_acc5": 95.0, "n_parameters": 7}


@pytest.mark.parametrize("epochs", [1, 3, 60])
def test_a_log_becomes_a_picture(tmp_path, epochs):
    log = tmp_path / "log.txt"
    log.write_text("".join(json.dumps(ROW | {"epoch": epoch}) + "\n" for epoch in range(epochs)))
    with Image.open(draw_curves(log, tmp_path / "new" / "curves.png")) as picture:
        assert picture.size == (1350, 540)
        red = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert any(colour == (192, 57, 43) for _, colour in red)  # the validation curve is there


@pytest.mark.parametrize(("text", "words"), [("", "no finished epoch"), ("epoch 1\n", "is no training log")])
def test_what_is_no_log_is_refused(tmp_path, text, words):
    log = tmp_path / "log.txt"
    log.write_text(text)
    with pytest.raises(ValueError, match=words):
        draw_curves(log, tmp_path / "curves.png")


def test_without_matplotlib_it_says_what_to_install():
    program = "import sys; sys.modules['matplotlib'] = None; import localvit.train.curves"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert 'pip install "localvit[plot]"' in told.stderr
