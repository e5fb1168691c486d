"""The style and the files of all figures."""
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure

from common.files import explain_os_errors

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00"]

# Decorator of functions that plot: applies the style and restores the caller's matplotlib settings.
styled = matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "report", "axes.spines.top": False,
                                "axes.spines.right": False})


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as <path>.png and <path>.svg, and closes it."""
    with explain_os_errors(path):
        figure.savefig(f"{path}.png", dpi=160)
        figure.savefig(f"{path}.svg", metadata={"Date": None})
    pyplot.close(figure)
