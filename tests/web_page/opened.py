"""A page in a browser, used as a person uses it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODEL = "localvit_nano_patch4_32"
WAIT = 60_000
"""Milliseconds, on a busy machine."""


@dataclass
class Opened:
    """The page, with everything that it asked for and complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    file_choosers: list[Any] = field(default_factory=list)

    @classmethod
    def at(cls, browser: Any, address: str, **options: Any) -> "Opened":
        """Open the page and wait until the model is loaded."""
        opened = cls(browser.new_page(**options))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("console", opened._keep_problem)
        opened.page.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.page.on("filechooser", lambda chooser: opened.file_choosers.append(chooser))
        opened.page.goto(address)
        opened.page.get_by_text("Ready for an image.").wait_for(timeout=WAIT)
        return opened

    def _keep_problem(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def forget(self) -> None:
        """Clear what earlier images have left."""
        self.page.evaluate("for (const id of ['status', 'error']) document.getElementById(id).textContent = ''")
        self.requests.clear()
        self.problems.clear()

    def choose(self, file: Any) -> None:
        self.page.locator("#file").set_input_files(file)

    def classify(self, file: Any, name: str) -> None:
        """Choose a file and wait for its result."""
        self.choose(file)
        self.wait_for_result(name)

    def wait_for_result(self, name: str) -> None:
        self.page.locator("#status", has_text=f"{name}: ").wait_for(timeout=WAIT)

    def error(self) -> str:
        alert = self.page.get_by_role("alert")
        alert.wait_for(timeout=WAIT)
        return alert.inner_text()

    def probabilities(self) -> dict[str, float]:
        """Shown classes and their probabilities, in their order."""
        rows = self.page.get_by_role("listitem").all()
        return {
            row.locator(".name").inner_text(): float(row.locator("data").get_attribute("value") or "nan")
            for row in rows
        }

    def seen(self) -> np.ndarray:
        """The pixels (h, w, 3) of the image as the model sees it."""
        width, height, rgba = self.page.locator("#seen").evaluate(
            "canvas => [canvas.width, canvas.height,"
            " [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]]"
        )
        return np.array(rgba, dtype=np.uint8).reshape(height, width, 4)[..., :3]
