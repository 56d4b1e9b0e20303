"""The page of what locality does: the figure and all numbers. locality.html.jinja contains the text and the layout."""

import base64
import statistics
from collections.abc import Sequence

from localvit.explanations.measures import Accuracy, LocalityMeasures
from localvit.explanations.overlay import short_name
from localvit.explanations.page import environment


def render_measures(models: Sequence[LocalityMeasures], png: bytes) -> str:
    """Render explain.html for measures of locality.

    Args:
        models: the measures of each model, in the order of the page.
        png: the figure of all of them.
    """
    pages = environment()
    pages.filters |= {"short_name": short_name}
    return pages.get_template("locality.html.jinja").render(
        models=models,
        measured=any(model.accuracies for model in models),
        figure=f"data:image/png;base64,{base64.b64encode(png).decode()}",
        mean=statistics.fmean,
        without=_without,
    )


def _without(each: Accuracy) -> str:
    if not each.without:
        return "none: as trained"
    return "all blocks" if len(each.without) > 1 else short_name(each.without[0])
