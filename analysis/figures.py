"""The style, the layout and the files of all figures. Sizes are in inches: a figure grows with what it shows."""
import functools
import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from common.writing import write_bytes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00"]
MODELS = ["llm", "stack", "base", "interleave", "stack-level", "llm-level"]  # have the same style in all figures
LINES: list[dict[str, Any]] = [{"color": color, "ls": style, "marker": marker, "ms": 4}
                               for color, style, marker in zip(PALETTE, ["-", "--", ":", "-."] * 2, "os^DvPX*")]
FONT = 8.0  # size of all text but the legend, in points
PAGE = 10.0  # width of a figure, unless a single panel is wider

# Decorator of functions that plot: applies the style, whatever the user's matplotlibrc says, and restores the caller's
# settings. Without parse_math a "$" in a name is a dollar sign.
styled = matplotlib.style.context(["default", {
    "font.size": 9, "axes.titlesize": FONT, "axes.titlelocation": "left", "axes.labelsize": FONT,
    "xtick.labelsize": FONT, "ytick.labelsize": FONT, "figure.labelsize": FONT, "text.parse_math": False,
    "axes.formatter.useoffset": False, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3,
    "svg.hashsalt": "report"}])


def model_styles(names: Iterable[str], styles: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: its style} for some models. Others than MODELS get the styles that these leave, then all again."""
    others = itertools.chain(styles[len(MODELS):], itertools.cycle(styles))
    return {name: styles[MODELS.index(name)] if name in MODELS else next(others) for name in names}


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as <path>.png and <path>.svg."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=min(160, 30000 / max(figure.get_size_inches())))
    figure.set_layout_engine("none")  # keeps the layout, which takes most of the time
    figure.savefig(svg, format="svg", metadata={"Date": None})
    for suffix, file in (("png", png), ("svg", svg)):  # another process may read them meanwhile
        write_bytes(f"{path}.{suffix}", file.getvalue())


def make_panels(count: int, width: float, height: float, margin: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in rows, and its axes.

    width, height: of a panel with its labels. margin: width of what stands at the sides of a row.
    """
    rows, columns = grid_shape(count, width, PAGE - margin)
    figure = Figure((max(4.5, columns * max(width, margin / columns) + margin), rows * height), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[divmod(index, columns)]) for index in range(count)]


def use_few_ticks(*axes: Axis) -> None:
    """Limits the ticks of numbers, so that their labels do not overlap in a small panel."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))


def add_legend(figure: Figure, handles: list[Artist]) -> None:
    """Adds a legend above the panels, and makes the figure higher by its height."""
    labels = [fold(str(handle.get_label()), 3.0) for handle in handles]
    rows, columns = grid_shape(len(labels), 0.95 + text_width(*labels), figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + rows * (0.07 + text_height(*labels)) + 0.1)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=FONT,
                  handlelength=4)  # which shows what tells dashed lines apart


def grid_shape(count: int, width: float, total: float) -> tuple[int, int]:
    """The numbers of rows and columns for `count` items of some width, in as few rows as a total width allows."""
    rows = math.ceil(count / max(1, int(total / width)))
    return rows, math.ceil(count / rows)


def fold(text: str, width: float) -> str:
    """The text in lines of about `width` inches, broken after punctuation or a space where there is some."""
    text = " ".join(text.split())
    if text_width(text) <= width:
        return text
    length = max(1, int(0.9 * width * len(text) / text_width(text)))
    return "\n".join(re.findall(rf".{{1,{length}}}(?:(?<=[-_/.: ])|$)|.{{{length}}}", text))


def text_width(*texts: str) -> float:
    """The width of the longest line of some texts."""
    return max(map(line_width, (line for text in texts for line in text.split("\n"))))


@functools.cache
def line_width(line: str) -> float:
    """The width of a line."""
    return TextPath((0, 0), line, size=FONT).get_extents().width / 72 if line.strip() else 0.0


def text_height(*texts: str) -> float:
    """The height of the text with the most lines."""
    return 1.25 * FONT / 72 * max(text.count("\n") + 1 for text in texts)
