"""The page in headless Chromium, beside `localvit.predict` on the same files."""

import http.server
import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from exported_files import NAMES, PREPROCESSING, linear_model, noise
from image_files import broken_files, write_image_files
from opened import MODEL, WAIT, Opened
from PIL import Image

import localvit
from localvit.data.images import open_image
from localvit.exporters import Onnx, export
from localvit.inference.runner import load_model
from localvit.web_page import write_page

TOLERANCE = 1e-4
"""Of probabilities. Both compute in float32, by different kernels."""


@pytest.fixture(scope="module")
def image_files(tmp_path_factory) -> list[Path]:
    return write_image_files(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def page_from_disk(browser, page_folder) -> Iterator[Opened]:
    """The page, opened as by a double click."""
    opened = Opened.at(browser, (page_folder / "index.html").as_uri())
    yield opened
    opened.page.close()


@pytest.fixture
def opened(page_from_disk) -> Opened:
    """The same page for several tests, without the results of earlier ones."""
    page_from_disk.forget()
    return page_from_disk


def assert_equals_predict(opened: Opened, wanted: localvit.evaluation.predict.Prediction) -> None:
    found = opened.probabilities()
    assert found == pytest.approx(dict(zip(wanted.class_names, wanted.probabilities, strict=True)), abs=TOLERANCE)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_it_classifies_one_image_after_another_as_predict_does(browser, image_files, page_folder):
    opened = Opened.at(browser, (page_folder / "index.html").as_uri())
    resizing = load_model(MODEL).preprocessing.resizing()
    for path, wanted in zip(image_files, localvit.predict(MODEL, image_files), strict=True):
        opened.classify(path, path.name)
        assert_equals_predict(opened, wanted)
        assert np.array_equal(opened.seen(), np.asarray(resizing(open_image(path)))), path.name
        said = "turned by 90° to the right" in opened.page.locator("#notes").inner_text()
        assert said == path.name.startswith("turned")
    assert opened.problems == []
    # Nothing but the page's own files, and what it keeps in memory.
    own = page_folder.as_uri() + "/"
    assert {url for url in opened.requests if not url.startswith(("blob:", "data:"))} == {
        own + str(file.relative_to(page_folder)) for file in page_folder.rglob("*") if file.is_file()
    }
    opened.page.close()


def test_a_request_would_be_stopped(opened):
    with _server(Path.cwd()) as (address, asked):
        outcome = opened.page.evaluate(
            "address => fetch(address, {mode: 'no-cors'}).then(() => 'sent', error => error.name)", address
        )
    assert (outcome, asked) == ("TypeError", [])
    assert any("Content Security Policy" in problem for problem in opened.problems)


def test_it_also_works_from_a_server_of_files(browser, page_folder, image_files):
    with _server(page_folder) as (address, asked):
        opened = Opened.at(browser, address)
        opened.classify(image_files[-1], image_files[-1].name)
    [wanted] = localvit.predict(MODEL, image_files[-1])
    assert_equals_predict(opened, wanted)
    assert {url for url in opened.requests if not url.startswith((address, "blob:", "data:"))} == set()
    assert len(asked) == len([file for file in page_folder.rglob("*") if file.is_file()])
    opened.page.close()


class _server:
    """A server of files on the loopback, and the paths that it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                asked.append(self.path)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    def __enter__(self) -> tuple[str, list[str]]:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/", self.asked

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_file_that_resizes_itself_takes_floats_and_returns_logits(browser, tmp_path):
    file, image = tmp_path / "tiny.onnx", tmp_path / "image.png"
    settings = Onnx(include=("resize",), input_type="float32")
    export(linear_model(), file, settings, class_names=NAMES, preprocessing=PREPROCESSING)
    Image.fromarray(noise(61, 47, 3)).save(image)
    opened = Opened.at(browser, write_page(file, tmp_path / "page").as_uri())
    opened.classify(image, "image.png")
    [wanted] = localvit.predict(str(file), image)
    assert_equals_predict(opened, wanted)
    assert set(opened.probabilities()) == set(NAMES)
    assert np.array_equal(opened.seen(), np.asarray(PREPROCESSING.resizing()(open_image(image))))
    opened.page.close()


def test_unusable_files_are_explained_and_the_next_image_works(opened, image_files):
    for name, (content, message) in broken_files().items():
        opened.choose({"name": name, "mimeType": "image/png", "buffer": content})
        assert opened.error().startswith(message)
        assert opened.page.locator("#status").inner_text() == ""
        opened.classify(image_files[0], image_files[0].name)
        assert not opened.page.get_by_role("alert").is_visible()
    assert opened.problems == []


def test_the_newest_image_wins(opened, image_files):
    for path in image_files[:5]:
        opened.choose(path)
    opened.wait_for_result(image_files[4].name)
    [wanted] = localvit.predict(MODEL, image_files[4])
    assert_equals_predict(opened, wanted)


def test_by_keyboard(browser, page_folder, image_files):
    opened = Opened.at(browser, (page_folder / "index.html").as_uri())
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Choose an image"
    page.keyboard.press("Enter")
    while not opened.file_choosers:
        page.wait_for_timeout(50)
    opened.file_choosers[0].set_files(image_files[0])
    opened.wait_for_result(image_files[0].name)
    assert page.evaluate("document.activeElement.id") == "choose"  # nothing takes the focus away
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Camera")
    dialog.wait_for(timeout=WAIT)
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.innerText") == "Use the camera"
    page.close()


def test_the_camera(opened):
    page = opened.page
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the photo").click(timeout=WAIT)
    opened.wait_for_result("photo")
    assert not page.get_by_role("dialog").is_visible()
    assert page.locator("#preview-size").inner_text() == "640 × 480 pixels"
    # Chromium's fake camera shows large shapes of a few colors, not one plain color.
    assert len(np.unique(opened.seen().reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pasted_and_dropped_images(event, opened, image_files):
    send = """([kind, name, bytes]) => {
      const data = new DataTransfer();
      if (bytes) data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
      else data.setData("text/plain", "https://localhost/a.png");
      const event = kind === "paste"
        ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true, cancelable: true})
        : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
      document.body.dispatchEvent(event);
    }"""
    opened.page.evaluate(send, [event, "text", None])
    assert ("copy an image" if event == "paste" else "drop its file") in opened.error()
    opened.page.evaluate(send, [event, "image.png", list(image_files[0].read_bytes())])
    opened.wait_for_result("image.png")
    [wanted] = localvit.predict(MODEL, image_files[0])
    assert_equals_predict(opened, wanted)


def test_what_a_screen_reader_is_given(opened, image_files):
    opened.classify(image_files[0], image_files[0].name)
    [wanted] = localvit.predict(MODEL, image_files[0])
    best, share = wanted.class_names[0], f"{100 * wanted.probabilities[0]:.1f} %"
    snapshot = opened.page.locator("main").aria_snapshot()
    for line in (
        '- heading "Image classification with localvit_nano_patch4_32" [level=1]',
        '- button "Choose an image"',
        '- button "Use the camera"',
        f'- status: "small.png: {best}, {share}"',
        '- heading "Result for small.png" [level=2]',
        '- img "Preview of small.png"',
        '- img "The image as the model sees it, resized and cropped"',
        '- list "Classes and their probabilities"',
        f"- listitem: {best} {share}",
    ):
        assert line in snapshot, snapshot


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_and_contrast(scheme, browser, page_folder, image_files):
    opened = Opened.at(browser, (page_folder / "index.html").as_uri(), color_scheme=scheme)
    name = "a-long-name" * 20 + ".png"
    opened.classify({"name": name, "mimeType": "image/png", "buffer": image_files[0].read_bytes()}, name)
    for width in (320, 400, 1000, 1600):
        opened.page.set_viewport_size({"width": width, "height": 900})
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("h1", "#drop-zone p", "#open-camera", "#status", "#classes .name", "#time", "table.about th"):
        assert _contrast(opened, selector) >= 4.5, selector  # WCAG 2.2, 1.4.3
    shot = Image.open(io.BytesIO(opened.page.screenshot())).convert("RGB")
    assert shot.getpixel((3, 3)) == {"light": (245, 246, 248), "dark": (15, 18, 22)}[scheme]
    opened.page.close()


def _contrast(opened: Opened, selector: str) -> float:
    """Of an element's text with what is behind it, by WCAG's formula."""
    colors = opened.page.locator(selector).first.evaluate("""element => {
      const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
      const text = rgb(getComputedStyle(element).color);
      while (rgb(getComputedStyle(element).backgroundColor)[3] === 0) element = element.parentElement;
      return [text, rgb(getComputedStyle(element).backgroundColor)];
    }""")
    luminances = []
    for color in colors:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in color[:3])]
        luminances.append(float(np.dot([0.2126, 0.7152, 0.0722], linear)))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)
