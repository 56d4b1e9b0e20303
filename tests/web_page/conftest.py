"""A page with the packaged model, and Chromium to open it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from opened import MODEL

from localvit.web_page import write_page
from localvit.web_page.vendored import web_runtime

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="session")
def web_files():
    """onnxruntime-web, which npm fetches once into the user's cache. Skips if it cannot be had."""
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    try:
        return web_runtime()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def browser(web_files) -> Iterator:
    """Chromium, which finds no address in any network."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    with sync_api.sync_playwright() as playwright:
        flags = [*FAKE_CAMERA, "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def page_folder(web_files, tmp_path_factory) -> Path:
    """A page with the packaged model."""
    folder = tmp_path_factory.mktemp("web") / "page"
    write_page(MODEL, folder)
    return folder
