"""The curves of a run: loss and accuracy by epoch, from its log."""

from pathlib import Path

from localvit.files import written_whole
from localvit.train.state import read_log

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('curves are drawn with matplotlib: pip install "localvit[plot]"') from error

TRAIN_COLOUR = "#7a8794"
VAL_COLOUR = "#c0392b"


def draw_curves(log: Path, picture: Path, title: str = "") -> Path:
    """Draw the log of a run into `picture` (PNG, SVG or PDF by its ending), and return that path.

    Raises FileNotFoundError or ValueError for a log that is none. Importing this module without matplotlib, which the
    extra `plot` brings, raises ImportError.
    """
    rows = read_log(log)
    epochs = [row["epoch"] + 1 for row in rows]
    marker = "o" if len(rows) <= 40 else None

    # A figure of its own and not pyplot's, which would choose a window system and keep the figure alive.
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in rows], color=TRAIN_COLOUR, marker=marker, ms=3, label="training")
    loss.plot(epochs, [row["test_loss"] for row in rows], color=VAL_COLOUR, marker=marker, ms=3, label="validation")
    loss.set(title="Loss (nats)", xlabel="epochs trained")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)

    acc1 = [row["test_acc1"] for row in rows]
    accuracy.plot(epochs, acc1, color=VAL_COLOUR, marker=marker, ms=3)
    accuracy.set(title=f"Validation Acc@1 (%): {acc1[-1]:.2f} at the end", xlabel="epochs trained")
    accuracy.set_ylim(0, 102)
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e9ec")
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    if title:
        figure.suptitle(title, fontsize=11)
    with written_whole(picture) as file:
        figure.savefig(file, format="png")
    return picture
