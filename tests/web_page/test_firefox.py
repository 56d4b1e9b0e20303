"""The page in Firefox, where it and Mozilla's driver are installed (`pip install marionette_driver`)."""

import shutil
import time

import numpy as np
import pytest
from image_files import write_image_files
from opened import MODEL, WAIT

import localvit
from localvit.data.images import open_image
from localvit.inference.runner import load_model

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
OPAQUE = ("photo.jpg", "progressive.jpg", "cmyk.jpg", "turned.webp", "palette.gif", "tall.png", "gray.png")
"""Without WebGL, which a machine without a display lacks, the colors of transparent pixels are others."""
TOLERANCE = 1e-4
"""Of probabilities. Both compute in float32, by different kernels."""


@pytest.fixture
def firefox(tmp_path, monkeypatch):
    marionette = pytest.importorskip("marionette_driver.marionette", reason="marionette_driver is not installed")
    if not FIREFOX:
        pytest.skip("neither firefox-esr nor firefox is installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    driver = marionette.Marionette(bin=FIREFOX, headless=True, port=0, gecko_log=str(tmp_path / "gecko.log"))
    driver.start_session()
    yield driver
    driver.quit()


def wait_for(firefox, start):
    """Wait until the page says something that starts so; returns what it says."""
    end = time.monotonic() + WAIT / 1000
    while time.monotonic() < end:
        said, failed = firefox.execute_script(
            "return ['status', 'error'].map(id => document.getElementById(id).textContent)"
        )
        assert not failed
        if said.startswith(start):
            return said
        time.sleep(0.1)
    raise AssertionError(f"the page says {said!r}")


def test_it_classifies_as_predict_does(firefox, page_folder, tmp_path):
    files = [path for path in write_image_files(tmp_path) if path.name in OPAQUE]
    assert len(files) == len(OPAQUE)
    firefox.navigate((page_folder / "index.html").as_uri())
    wait_for(firefox, "Ready for an image.")
    # A driver writes into a field that a person sees.
    firefox.execute_script("document.getElementById('file').hidden = false")
    resizing = load_model(MODEL).preprocessing.resizing()
    for path, wanted in zip(files, localvit.predict(MODEL, files), strict=True):
        firefox.find_element("id", "file").send_keys(str(path))
        assert wait_for(firefox, f"{path.name}: ").startswith(f"{path.name}: {wanted.class_names[0]}")
        rows = firefox.execute_script(
            "return [...document.querySelectorAll('#classes li')].map("
            "row => [row.querySelector('.name').textContent, row.querySelector('data').value])"
        )
        found = {name: float(value) for name, value in rows}
        expected = dict(zip(wanted.class_names, wanted.probabilities, strict=True))
        assert found == pytest.approx(expected, abs=TOLERANCE), path.name
        rgba = firefox.execute_script(
            "const seen = document.getElementById('seen');"
            "return [...seen.getContext('2d').getImageData(0, 0, seen.width, seen.height).data]"
        )
        pixels = np.asarray(resizing(open_image(path)))
        assert np.array_equal(np.array(rgba, dtype=np.uint8).reshape(*pixels.shape[:2], 4)[..., :3], pixels), path.name
