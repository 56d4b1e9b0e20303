"""The page explain.html: every image beside its maps. The template in this folder contains the text and the layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from localvit.evaluation.report.page import decimal, percent, plural
from localvit.explanations.explain import Explanation, Method
from localvit.explanations.overlay import as_data_url, draw_overlay, enlarge, short_name

MAX_IMAGES = 100
"""Images on the page; all have a PNG file."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A map drawn over its image."""

    name: str
    """The layer."""
    image: str
    """A data: URL."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One image of the page."""

    explanation: Explanation
    image: str
    """A data: URL."""
    panels: tuple[Panel, ...]
    is_empty: bool
    """Whether no patch has any weight."""

    @classmethod
    def of(cls, explanation: Explanation) -> "Card":
        """Draw an explanation that has maps."""
        assert explanation.image is not None
        several = len(explanation.maps) > 1
        side = 112 if several else 224
        panels = tuple(
            Panel(
                name=short_name(each.name) if several else each.name,
                image=as_data_url(draw_overlay(explanation.image, each.values_HW, smallest_side=side)),
            )
            for each in explanation.maps
        )
        empty = not any(each.values_HW.any() for each in explanation.maps)
        return cls(
            explanation=explanation,
            image=as_data_url(enlarge(explanation.image, side)),
            panels=panels,
            is_empty=empty,
        )


def render_page(
    cards: Sequence[Card], method: Method, *, model: str, num_images: int, failed: Sequence[Explanation], layer: str
) -> str:
    """Render explain.html.

    Args:
        cards: the images, at most `MAX_IMAGES`.
        method: how they were explained.
        model: what the model is.
        num_images: number of images that have maps.
        failed: those that have an error instead.
        layer: where a class activation map was taken.
    """
    return (
        environment()
        .get_template("explain.html.jinja")
        .render(cards=cards, method=method, model=model, num_images=num_images, failed=failed, layer=layer)
    )


def environment() -> jinja2.Environment:
    """The templates of this folder, and of the report, whose style sheets and macros they use."""
    loader = jinja2.ChoiceLoader(
        [
            jinja2.PackageLoader("localvit.explanations", "."),
            jinja2.PackageLoader("localvit.evaluation.report", "."),
        ]
    )
    found = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    found.filters |= {"percent": percent, "decimal": decimal, "plural": plural}
    return found
