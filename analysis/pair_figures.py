"""The figures of a study of pairs of models."""
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.contrasts import Contrast, Difference
from analysis.figures import (
    LINES,
    add_legend,
    fold,
    make_panels,
    model_styles,
    save_figure,
    styled,
    text_height,
    use_few_ticks,
)
from analysis.inference import POWER, PairedDifference
from analysis.loss_curves import draw_loss_curves
from analysis.matching import efficient_branch
from analysis.measures import LEARNING, MATCHED_ON
from analysis.pairs import LEVEL_ENDING, Study
from analysis.stages import TEXT

# Of the contrasts, in other colours than the MODELS.
MARKS: list[dict[str, Any]] = [{"color": color, "marker": marker, "ms": 5} for color, marker in zip(
    ["#000000", "#8A8A00", "#6A3D9A", "#8C510A", "#008080", "#B2182B", "#4D4D4D", "#C51B7D"], "osD^vPX*")]
MIN_PAIRS = 3  # the intervals of contrasts with fewer do not set the range of the axis
GREY = "#888888"
HOLLOW: dict[str, Any] = {"marker": "o", "ms": 2.5, "mfc": "white", "mew": 0.6}


@styled
def plot_pairs(study: Study, folder: Path, primary: str) -> dict[str, str]:
    """Plots the figures for which a study has results. Returns {file name without suffix: caption}."""
    learning = study.learning_text(study.main_setting, study.compared)
    over_pairs = ": mean over the pairs and 95% interval" * (len(study.pairs) > 1)
    matched = " Within pairs at equal loss, as they are compared, the difference can have another sign." \
        * study.matches_learning
    figures: dict[str, tuple[Callable[[Study, str], Figure | None], str]] = {
        "differences": (plot_differences, f"Differences after {study.stages[-1]} at {learning}{over_pairs}. Positive "
                        "is more forgetting by the first model. The measure of the answer is on top. "
                        f"Intervals of fewer than {MIN_PAIRS} pairs may leave the panel."),
        "learning": (plot_learning, f"{primary} over {LEARNING}: a thin line for each pair, a point for each learning "
                     "rate, hollow if it learns no more than a smaller one and is left out. A thick line is the mean "
                     f"of the compared pairs at each rate.{matched}"),
        "by-rate": (plot_by_rate, f"Difference in {primary} at each learning rate, at which learning is not matched, "
                    f"and at equal learning{over_pairs}."),
        "by-stage": (plot_by_stage, f"Difference in {primary} by stage at {learning}{over_pairs}."),
        "by-start": (plot_by_start, f"Difference in {primary} of each pair at {learning}, over the difference of the "
                     "losses of both m0: on held-out text, and on the last task."),
        "pretraining": (plot_pretraining, "Held-out loss during pretraining: a thin line for each pair, a thick one "
                        "for the mean over the pairs. A grown model starts with the FLOPs of its base. The first "
                        "losses may lie above the panel.")}
    plotted = {name: figure for name, (plot, _) in figures.items() if (figure := plot(study, primary))}
    for name, figure in plotted.items():
        save_figure(figure, folder / name)
    return {name: figures[name][1] for name in plotted}


def contrast_styles(study: Study) -> list[tuple[Contrast, dict[str, Any]]]:
    """The contrasts with their styles."""
    return list(zip(study.contrasts, MARKS))


def contrast_handles(contrasts: Sequence[Contrast], study: Study) -> list[Line2D]:
    """The handles of a legend of contrasts."""
    return [Line2D([], [], ls="", label=str(contrast), **style) for contrast, style in contrast_styles(study)
            if contrast in contrasts]


def plot_differences(study: Study, primary: str) -> Figure | None:
    """A forest plot: a panel for each unit, a row for each measure, with a point and an interval for each contrast.

    Like the functions below, returns None without results.
    """
    rows: dict[str, dict[str, list[tuple[int, Difference]]]] = {}  # unit -> measure -> (contrast, difference)
    for name in dict.fromkeys([primary, *study.measures]):
        found = [(place, one) for place, contrast in enumerate(study.contrasts[:len(MARKS)])
                 if name != study.main_setting
                 and (one := study.difference(contrast, name, study.last, study.main_setting))]
        if found:
            rows.setdefault(study.measures[name].unit, {})[name] = found
    if not rows:
        return None
    shown = {place for measures in rows.values() for found in measures.values() for place, _ in found}
    height = 0.16 + 0.16 * len(shown)
    heights = [max(0.6, height * len(measures)) for measures in rows.values()]
    figure = Figure((7.5, sum(heights) + 0.55 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 1, height_ratios=heights)
    for index, (unit, measures) in enumerate(rows.items()):
        panel = figure.add_subplot(grid[index])
        draw_forest(panel, list(measures.values()), sorted(shown))
        labels = [fold(f"{name} (primary)" if name == primary and study.is_primary(name) else name, 2.2)
                  for name in measures]
        panel.set_yticks(range(len(measures)), labels)
        for label, name in zip(panel.get_yticklabels(), measures):
            label.set_fontweight("bold" if name == primary else "normal")
        panel.set(ylim=(len(measures) - 0.5, -0.5), xlabel=f"difference ({unit})")
    add_legend(figure, [*contrast_handles([study.contrasts[place] for place in sorted(shown)], study),
                        Line2D([], [], ls="", color=GREY, marker="|", ms=8,
                               label=f"smallest detectable difference ({POWER:.0%} power)")])
    return figure


def draw_forest(panel: Axes, rows: Sequence[Sequence[tuple[int, Difference]]], places: Sequence[int]) -> None:
    """Draws a point, an interval and the smallest detectable difference for each contrast of each row. places: of the
    contrasts in MARKS."""
    for row, found in enumerate(rows):
        for place, difference in found:
            y = row + 0.7 * ((places.index(place) + 0.5) / len(places) - 0.5)
            estimate = difference.estimate
            draw_interval(panel, [estimate.mean], [y], [estimate], MARKS[place], horizontal=True)
            if not math.isnan(limit := estimate.smallest_detectable):
                panel.plot([-limit, limit], [y, y], ls="", color=GREY, marker="|", ms=8)
    panel.axvline(0, color="#000000", lw=0.8)
    panel.grid(axis="x")
    use_few_ticks(panel.xaxis)
    estimates = [difference.estimate for found in rows for _, difference in found]
    if several := [one for one in estimates if len(one.values) >= MIN_PAIRS]:
        extent = 1.1 * max(max(abs(one.mean) + one.half_width, one.smallest_detectable) for one in several)
        if extent:
            panel.set_xlim(-extent, extent)


def draw_interval(panel: Axes, x: Sequence[float], y: Sequence[float], estimates: Sequence[PairedDifference],
                  style: dict[str, Any], horizontal: bool = False) -> None:
    """Draws points with the 95% intervals of estimates, as far as they have one."""
    errors = [0 if math.isnan(one.half_width) else one.half_width for one in estimates]
    panel.errorbar(x, y, xerr=errors if horizontal else None, yerr=None if horizontal else errors, ls="", capsize=2,
                   elinewidth=1.2, **style)


def plot_learning(study: Study, primary: str) -> Figure | None:
    """Forgetting over the loss on the new task, a panel for each stage and a curve for each model."""
    shown = [model for model in study.models if model in study.compared or not model.endswith(LEVEL_ENDING)]
    styles = model_styles(shown, LINES)
    curves: dict[int, dict[str, dict[int, np.ndarray]]] = {}  # stage -> model -> pair -> (x, y) [2, R]
    for number in range(1, study.last + 1):
        for model in styles:
            if found := {pair: np.array([x, [one.value for one in y]]) for pair in study.pairs
                         for x, y, _ in [study.curve(primary, pair, model, number)] if len(x)}:
                curves.setdefault(number, {})[model] = found
    if not curves:
        return None
    titles = [fold(study.stages[number], 2.7) for number in curves]
    figure, panels = make_panels(len(curves), 3.2, 2.4 + text_height(*titles))
    for panel, title, (number, of_models) in zip(panels, titles, curves.items()):
        most = max(curve.shape[1] for found in of_models.values() for curve in found.values())
        complete = {model: {pair for pair, curve in found.items() if curve.shape[1] == most}
                    for model, found in of_models.items()}
        compared = study.difference(study.contrasts[0], primary, number, study.main_setting)
        common = set.intersection(set(compared.by_pair if compared else ()),
                                  *(complete.get(model, set()) for model in study.compared))
        for model, found in of_models.items():
            style = styles[model]
            for curve in found.values():
                branch = efficient_branch(curve[0])
                panel.plot(*curve[:, branch], lw=0.6, alpha=0.5, marker=".", ms=3, color=style["color"],
                           ls=style["ls"])
                if len(branch) < curve.shape[1]:
                    panel.plot(*np.delete(curve, branch, axis=1), ls="", alpha=0.5, color=style["color"], **HOLLOW)
            if common and common <= complete[model]:
                panel.plot(*np.mean([found[pair] for pair in common], axis=0), lw=2, **style)
        panel.set_title(title)
        panel.invert_xaxis()
        panel.grid()
        use_few_ticks(panel.xaxis, panel.yaxis)
    figure.supxlabel(f"{LEARNING} (nats/token), to the right more was learned")
    figure.supylabel(fold(f"{primary} ({study.measures[primary].unit})", 2.4))
    drawn = {model for of_models in curves.values() for model in of_models}
    handles: list[Artist] = [Line2D([], [], label=model, **style)
                             for model, style in styles.items() if model in drawn]
    if any(len(efficient_branch(curve[0])) < curve.shape[1]
           for of_models in curves.values() for found in of_models.values() for curve in found.values()):
        handles.append(Line2D([], [], ls="", color=GREY, **HOLLOW, label="learns no more than a smaller rate"))
    add_legend(figure, handles)
    return figure


def plot_by_rate(study: Study, primary: str) -> Figure | None:
    """The primary difference after the last stage at each learning rate, and at equal learning."""
    settings = [*study.rates, *MATCHED_ON]
    labels = [*(f"rate\n{rate}" for rate in study.rates), *(f"equal\n{fold(name, 0.9)}" for name in MATCHED_ON)]
    return plot_over(study, primary, labels, [(study.last, setting) for setting in settings], "compared at") \
        if study.matches_learning else None


def plot_by_stage(study: Study, primary: str) -> Figure | None:
    """The primary difference after each stage."""
    labels = ["\n".join(fold(part, 0.9) for part in name.split("-", 1)) for name in study.stages[1:]]
    return plot_over(study, primary, labels, [(number, study.main_setting) for number in range(1, study.last + 1)],
                     "stage") if study.last > 1 else None


def plot_over(study: Study, primary: str, labels: Sequence[str], places: Sequence[tuple[int, str]],
              title: str) -> Figure | None:
    """The primary difference of each contrast at several places (stage, setting), with the pairs as small points.

    labels: of the places.
    """
    found = {contrast: [(place, one) for place, (number, setting) in enumerate(places)
                        if (one := study.difference(contrast, primary, number, setting))]
             for contrast, _ in contrast_styles(study)}
    found = {contrast: points for contrast, points in found.items() if points}
    if not found:
        return None
    figure, (panel,) = make_panels(1, max(4.5, 1.0 * len(labels) + 1.0), 2.6 + text_height(*labels))
    for index, contrast in enumerate(found):
        style = dict(contrast_styles(study))[contrast]
        shift = 0.5 * ((index + 0.5) / len(found) - 0.5)
        for place, one in found[contrast]:
            values = one.estimate.values
            panel.plot([place + shift + 0.06] * len(values), values, ls="", marker=".", ms=3, alpha=0.6,
                       color=style["color"])
        x, estimates = [place + shift for place, _ in found[contrast]], [one.estimate for _, one in found[contrast]]
        draw_interval(panel, x, [one.mean for one in estimates], estimates, style)
    panel.axhline(0, color="#000000", lw=0.8)
    panel.set_xticks(range(len(labels)), labels)
    panel.set(xlim=(-0.5, len(labels) - 0.5), xlabel=title,
              ylabel=fold(f"difference in {primary} ({study.measures[primary].unit})", 2.2))
    panel.grid(axis="y")
    use_few_ticks(panel.yaxis)
    add_legend(figure, [*contrast_handles(list(found), study),
                        Line2D([], [], ls="", marker=".", ms=3, color=GREY, label="a pair")])
    return figure


def plot_by_start(study: Study, primary: str) -> Figure | None:
    """The primary difference of each pair over the difference of the losses of both m0: on held-out text, and on the
    last task."""
    points: dict[str, dict[Contrast, list[tuple[float, float]]]] = {}
    for name, (contrast, _) in itertools.product((TEXT, study.last_task), contrast_styles(study)):
        starts = study.start_losses(contrast, name)
        found = study.difference(contrast, primary, study.last, study.main_setting)
        both = [(starts[pair][0] - starts[pair][1], one.value) for pair, one in found.by_pair.items()
                if pair in starts] if found else []
        if both:
            points.setdefault(name, {})[contrast] = both
    if len(study.pairs) < 2 or not points:
        return None
    figure, panels = make_panels(len(points), 4.2, 3.0)
    for panel, (name, of_contrasts) in zip(panels, points.items()):
        for contrast, style in contrast_styles(study):
            if contrast in of_contrasts:
                panel.plot(*zip(*of_contrasts[contrast]), ls="", **style)
        panel.axhline(0, color="#000000", lw=0.8)
        panel.axvline(0, color="#000000", lw=0.8)
        panel.set(xlabel=f"{'held-out loss' if name == TEXT else f'loss on {name}'} of m0, difference (nats/token)")
        panel.grid()
        use_few_ticks(panel.xaxis, panel.yaxis)
    figure.supylabel(fold(f"difference in {primary} ({study.measures[primary].unit})", 2.2))
    shown = {contrast for of_contrasts in points.values() for contrast in of_contrasts}
    add_legend(figure, [*contrast_handles(list(shown), study)])
    return figure


def plot_pretraining(study: Study, primary: str) -> Figure | None:
    """The held-out loss of each m0 over its training FLOPs."""
    styles = {model: style | {"ms": 2} for model, style in model_styles(study.models, LINES).items()}
    curves = {model: found for model in styles if not model.endswith(LEVEL_ENDING)
              and (found := [curve for pair in study.pairs if (curve := study.pretraining_curve(pair, model))])}
    if not curves:
        return None
    figure, (panel,) = make_panels(1, 6.5, 3.6)
    add_legend(figure, draw_loss_curves(panel, curves, styles))
    return figure
