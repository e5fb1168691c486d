"""The figure of the methods of each model: what is learned against what is forgotten, over learning rates."""
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from analysis.figures import PALETTE, add_legend, fold, make_panels, save_figure, styled, text_height, use_few_ticks
from analysis.matching import efficient_branch
from analysis.measures import LEARNING
from analysis.method_plane import START, Point, gap_of, pareto_front, points_of, start_point
from analysis.pairs import Study
from analysis.stages import method_title

HOLLOW: dict[str, Any] = {"ls": "", "marker": "o", "ms": 4, "mfc": "white"}
FRONT: dict[str, Any] = {"color": "#DDDDDD", "lw": 5, "marker": "o", "ms": 11}  # a front may be a single point


@styled
def plot_planes(studies: dict[str, Study], folder: Path, measure: str) -> dict[str, str]:
    """Plots forgetting over the loss on the new task: a panel for each method of each model, with the curve of the
    baseline and the Pareto front of all methods. Returns {file name without suffix: caption}, empty without points."""
    points = {model: points_of(study, measure) for model, study in studies.items()}
    places = [(model, method) for model, study in studies.items()
              for method in sorted(dict.fromkeys(point.method for point in points[model]),
                                   key=lambda method: mean_gap(study, method, measure))
              if method != study.reference]
    if not places:
        return {}
    titles = [fold(f"{model}: " * (len(studies) > 1) + method_title(method), 2.2) for model, method in places]
    figure, panels = make_panels(len(places), 2.4, 2.0 + text_height(*titles))
    fronts = {model: [point for point in pareto_front([*points[model], *start_point(study, measure)])
                      if point.method != START] for model, study in studies.items()}
    efficient = [point for model, study in studies.items() for name in study.models
                 for point in split_curve(points[model], name)[0]]
    for panel, title, (model, method) in zip(panels, titles, places):
        study, own, front = studies[model], points[model], fronts[model]
        panel.plot(*coordinates(own), ls="", marker=".", ms=3, color="#BBBBBB", zorder=0)
        panel.step(*coordinates(front), where="post", **FRONT, zorder=-1)
        draw_curve(panel, [point for point in own if point.method == study.reference], PALETTE[0])
        draw_curve(panel, [point for point in own if point.method == method], PALETTE[1])
        for point in own:
            if point.method == method and point.rate:
                panel.annotate(short_rate(point.rate), (point.loss, point.forgetting), (4, -8), fontsize=7,
                               textcoords="offset points", color=PALETTE[1], annotation_clip=True,
                               path_effects=[withStroke(linewidth=1.5, foreground="white")])
        panel.set(**{limit: with_margin(values) for limit, values in zip(("xlim", "ylim"), coordinates(efficient))})
        panel.set_title(title)
        panel.invert_xaxis()
        panel.grid()
        use_few_ticks(panel.xaxis, panel.yaxis)
    figure.supxlabel(f"{LEARNING} after the last stage (nats/token), to the right more was learned")
    figure.supylabel(fold(f"{measure} ({next(iter(studies.values())).measures[measure].unit})", 2.6 + 1.2 * (
        len(places) > 4)))
    baselines = " / ".join(dict.fromkeys(method_title(study.reference) for study in studies.values()))
    rates = dict.fromkeys(short_rate(point.rate) for model, study in studies.items() for point in points[model]
                          if point.method == study.reference and point.rate)
    baselines += f" ({', '.join(rates)})" if rates else ""
    add_legend(figure, [Line2D([], [], color=PALETTE[0], marker="o", ms=4, lw=1.2, label=baselines),
                        Line2D([], [], color=PALETTE[1], marker="o", ms=4, lw=1.2, label="the method, with its rates"),
                        Line2D([], [], color="#666666", **HOLLOW, label="rate that learns no more than a smaller one"),
                        Line2D([], [], color="#BBBBBB", ls="", marker=".", ms=3, label="all methods and rates"),
                        Line2D([], [], **FRONT, label="Pareto front")])
    save_figure(figure, folder / "methods")
    return {"methods": f"{measure} over {LEARNING}: a panel for each method, with its learning rates, {baselines} and "
                       f"the Pareto front of all methods and {START}, which lies outside. So may rates that learn no "
                       "more than a smaller one of their method."}


def mean_gap(study: Study, method: str, measure: str) -> float:
    """The mean difference in forgetting between a method and the baseline (see gap_of); infinity if it is unknown."""
    gap = gap_of(study, method, measure)
    return gap.mean if gap else math.inf


def coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """The losses and the forgetting of points."""
    return [point.loss for point in points], [point.forgetting for point in points]


def with_margin(values: Sequence[float]) -> tuple[float, float]:
    """The limits of an axis that shows all values."""
    margin = 0.15 * (max(values) - min(values)) or 0.1
    return min(values) - margin, max(values) + margin


def split_curve(points: Sequence[Point], method: str) -> tuple[list[Point], list[Point]]:
    """The points of a method on its efficient branch, and the others."""
    own = [point for point in points if point.method == method]
    branch = efficient_branch(np.array([point.loss for point in own])).tolist() if own else []
    return [own[place] for place in branch], [point for place, point in enumerate(own) if place not in branch]


def short_rate(rate: str) -> str:
    """A learning rate in as few characters as possible, such as 1e-4."""
    return np.format_float_scientific(float(rate), trim="-", exp_digits=1)


def draw_curve(panel: Axes, points: Sequence[Point], color: str) -> None:
    """Draws the points of one method, joined where a larger learning rate learns more."""
    joined, others = split_curve(points, points[0].method) if points else ([], [])
    panel.plot(*coordinates(joined), color=color, lw=1.2, marker="o", ms=4)
    panel.plot(*coordinates(others), color=color, **HOLLOW)
