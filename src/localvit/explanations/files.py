"""Writing explanations: a PNG for each image, explain.html and explain.json."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from localvit.explanations.explain import Explanation, Method
from localvit.explanations.overlay import draw_explanation
from localvit.explanations.page import MAX_IMAGES, Card, render_page
from localvit.utils.files import atomic_write

PAGE, NUMBERS = "explain.html", "explain.json"
"""The names of the files beside the images."""


def write_explanations(
    explanations: Iterable[Explanation],
    directory: Path,
    method: Method,
    *,
    model: str,
    done: Callable[[Explanation], None] = lambda each: None,
) -> tuple[int, int]:
    """Write each explanation as a PNG, then the page and the list of all, each atomically.

    The page is self-contained: it needs no other file and no network. Images are drawn as they come, so that any number
    fits in memory.

    Args:
        explanations: of the method.
        directory: folder for the files, created if missing. Files of the same names are replaced.
        method: how the images were explained.
        model: what the model is, for the page.
        done: called after each image.

    Returns:
        How many images were explained, and how many have an error instead.

    Raises:
        OSError: `directory` cannot be written to.
    """
    cards: list[Card] = []
    failed: list[Explanation] = []
    rows: list[dict[str, Any]] = []
    layer = ""
    for number, each in enumerate(explanations, start=1):
        if each.error is not None:
            failed.append(each)
            rows.append({"file": each.file, "error": each.error})
        else:
            png = png_name(number, each.file)
            with atomic_write(directory / png) as file:
                draw_explanation(each).save(file, "PNG", optimize=True)
            layer = each.maps[0].name
            rows.append(_row(each, png))
            if len(cards) < MAX_IMAGES:
                cards.append(Card.of(each))
        done(each)
    num_images = len(rows) - len(failed)
    page = render_page(cards, method, model=model, num_images=num_images, failed=failed, layer=layer)
    for name, text in ((PAGE, page), (NUMBERS, json.dumps({"method": method, "images": rows}, indent=2) + "\n")):
        with atomic_write(directory / name) as file:
            # A file name that is not valid UTF-8 contains lone surrogates, which UTF-8 cannot encode.
            file.write_bytes(text.encode(errors="backslashreplace"))
    return num_images, len(failed)


def png_name(number: int, file: str) -> str:
    """A name for the PNG of the image with that number, of characters that every file system accepts."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in Path(file).stem)[:80]
    return f"{number:04d}-{stem or 'image'}.png"


def _row(each: Explanation, png: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "file": each.file,
        "png": png,
        "predicted": each.predicted,
        "probability": each.probability,
    }
    if each.target is not None:
        row |= {"target": each.target, "target_probability": each.target_probability}
    row["maps"] = [
        {"layer": heat.name, "values": [[float(f"{value:.4g}") for value in line] for line in heat.values_HW.tolist()]}
        for heat in each.maps
    ]
    return row
