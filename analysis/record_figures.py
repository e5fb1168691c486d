"""The figures of a report, plotted from a record."""
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures import PALETTE, save_figure, styled
from analysis.record import Record, task_metric
from analysis.results import Stage
from analysis.statistics import Estimate
from analysis.tables import BIAS

# Markers, lines and bars of the models, in order.
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
LINES: list[dict[str, Any]] = [{"ls": style, "marker": marker, "ms": 4}
                               for style, marker in zip(["-", "--", ":", "-."] * 2, MARKERS)]
BARS: list[dict[str, Any]] = [{"facecolor": color, "hatch": hatch, "edgecolor": "white"}
                              for color, hatch in zip(PALETTE, ["", "//", "..", "xx"] * 2)]

Points = list[tuple[float, float]]
Cells = dict[str, np.ndarray]  # model -> a heat map [rows, columns], NaN where nothing was measured


@styled
def plot_record(record: Record, folder: Path) -> dict[str, str]:
    """Plots all figures for which the record has results. Returns {file name without suffix: caption}."""
    first_seed = " (the first seed)" * record.several_seeds
    figures = {
        "benchmarks": (plot_benchmarks, "Each benchmark over the stages, with 95% intervals."),
        "forgetting": (plot_forgetting, "FG by category, with 95% intervals."),
        "bias": (plot_bias,
                 "Share of pairs in which the stereotype is the more probable sentence (%); 50 is balanced."),
        "tasks": (plot_tasks, "Each task's metric at every stage; each column has its own colour scale."),
        "losses": (plot_losses, f"Loss over tokens, a panel per stage{first_seed}."),
        "calibration": (plot_calibration,
                        f"Accuracy against expected calibration error, stages joined in order{first_seed}.")}
    captions = {}
    for name, (plot, caption) in figures.items():
        if figure := plot(record):
            save_figure(figure, folder / name)
            captions[name] = caption
    return captions


def plot_benchmarks(record: Record) -> Figure | None:
    """Benchmarks over the stages with 95% intervals: a panel per category, a colour per benchmark, a style per model.

    Like the functions below, returns None without results.
    """
    if not record.benchmarks:
        return None
    figure, axes = make_panels(len(record.categories))
    for panel, category in zip(axes, record.categories):
        handles = []
        for benchmark, color in zip(record.benchmarks_of(category), itertools.cycle(PALETTE)):
            handles.append(Line2D([], [], color=color, label=benchmark.label or benchmark.name))
            for index, model in enumerate(record.chains):
                values = [record.benchmark_value(model, number, benchmark.name) for number in range(record.last + 1)]
                points = [(x + 0.08 * index, 100 * value.value, 100 * (value.interval[1] - value.value))
                          for x, value in enumerate(values) if value]
                if points:
                    x, y, error = zip(*points)
                    panel.errorbar(x, y, [0 if math.isnan(e) else e for e in error], capsize=2, lw=1.4, elinewidth=0.6,
                                   color=color, **LINES[index % 8])
        panel.legend(handles=handles, frameon=False, fontsize=7, title=category, loc="lower center",
                     bbox_to_anchor=(0.5, 1), ncols=min(3, len(handles)), title_fontsize=10)  # above: hides no curve
        panel.set(xticks=range(record.last + 1), ylabel="metric (%)")
        panel.set_xticklabels(stage_labels(record), rotation=30, ha="right")
        panel.grid(alpha=0.3)
    add_legend(figure, [Line2D([], [], color="#444444", label=model, **LINES[index % 8])
                        for index, model in enumerate(record.chains)])
    return figure


def plot_forgetting(record: Record) -> Figure | None:
    """FG by category as bars with 95% intervals and values."""
    models, categories = list(record.chains), record.categories
    bars = {(index, place): estimate for index, model in enumerate(models) for place, category in enumerate(categories)
            if (estimate := record.category_fg(model, category))}
    if not bars:
        return None
    figure, panel = pyplot.subplots(figsize=(1.6 + 1.5 * len(categories), 3.6), layout="constrained")
    width = 0.8 / len(models)
    for (index, place), estimate in bars.items():
        x = place + (index - (len(models) - 1) / 2) * width
        error = None if math.isnan(estimate.error) else estimate.interval[1] - estimate.value
        panel.bar(x, estimate.value, width * 0.92, yerr=error, error_kw={"lw": 0.8, "capsize": 3}, **BARS[index % 8])
        panel.annotate(f"{estimate.value:z.1f}", (x, estimate.value + math.copysign(error or 0, estimate.value)),
                       (0, math.copysign(3, estimate.value)), textcoords="offset points", ha="center",
                       va="bottom" if estimate.value >= 0 else "top")
    panel.axhline(0, color="#000000", lw=0.8)
    panel.margins(y=0.15)
    panel.set(xticks=range(len(categories)), ylabel="FG (%), positive is forgetting")
    panel.set_xticklabels(categories)
    add_legend(figure, [Patch(label=model, **BARS[index % 8]) for index, model in enumerate(models)])
    return figure


def plot_bias(record: Record) -> Figure | None:
    """The share of stereotypes in each part of the bias benchmarks, as heat maps."""
    parts = record.benchmarks_of(BIAS, parts=True)
    if not parts:
        return None
    cells = {model: 100 * np.array([[value_of(record.benchmark_value(model, number, b.name))
                                     for number in range(record.last + 1)] for b in parts]) for model in record.chains}
    figure, image = plot_heat_maps(cells, cells, [b.label or b.name for b in parts], stage_labels(record), "{:.0f}",
                                   cmap="PuOr_r", vmin=0, vmax=100)
    figure.colorbar(image, ax=figure.axes, label="stereotype (%)", shrink=0.9)
    return figure


def plot_tasks(record: Record) -> Figure | None:
    """Each task's metric at every stage, as heat maps."""
    if not record.tasks:
        return None
    cells = {model: np.array([[value_of(record.task_value(model, number, task)) for task in record.tasks]
                              for number in range(record.last + 1)]) for model in record.chains}
    values = np.concatenate(list(cells.values()))
    low, high = np.fmin.reduce(values), np.fmax.reduce(values)  # of each column
    shades = {model: (matrix - low) / np.where(high > low, high - low, 1) for model, matrix in cells.items()}
    columns = [f"{task} ({task_metric(task)})" for task in record.tasks]
    figure, _ = plot_heat_maps(cells, shades, stage_labels(record), columns, "{:z.1f}", cmap="cividis", vmin=0,
                               vmax=1)
    figure.supxlabel("colours: lowest to highest value of a column", fontsize=8)
    return figure


def plot_heat_maps(cells: Cells, shades: Cells, rows: Sequence[str], columns: Sequence[str], form: str,
                   **scale: Any) -> tuple[Figure, AxesImage]:
    """Heat maps side by side, one per model, with the values in the cells. Returns the figure and the last heat map.

    shades: the values that give the colours. scale: the colour map and its limits, options of matplotlib's imshow.
    """
    figure, axes = pyplot.subplots(1, len(cells), figsize=(1.7 + len(cells) * (0.4 + 0.85 * len(columns)),
                                                           max(2.6, 1.4 + 0.32 * len(rows))),
                                   layout="constrained", squeeze=False, sharey=True)
    for panel, (model, matrix) in zip(axes.flat, cells.items()):
        image = panel.imshow(shades[model], aspect="auto", **scale)
        for y, x in np.argwhere(~np.isnan(matrix)):
            red, green, blue, _ = image.cmap(image.norm(shades[model][y, x]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            panel.text(x, y, form.format(matrix[y, x]), ha="center", va="center", fontsize=8,
                       color="white" if dark else "black")
        panel.set(title=model, xticks=range(len(columns)), yticks=range(len(rows)))
        panel.set_xticklabels(columns, rotation=30, ha="right")
        panel.set_yticklabels(rows)
        panel.spines[:].set_visible(False)
    return figure, image


def value_of(estimate: Estimate | None) -> float:
    """The value of an estimate, NaN for None."""
    return math.nan if estimate is None else estimate.value


def plot_losses(record: Record) -> Figure | None:
    """Training and eval loss over tokens, a panel per stage."""
    panels: dict[str, dict[str, tuple[Points, Points, list[float]]]] = {}
    for number, name in enumerate(record.stages):
        for model, seeds in record.chains.items():
            stage = next(iter(seeds.values())).get(number)
            if stage and stage.log:
                panels.setdefault(name, {})[model] = loss_curve(stage)
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    models = list(dict.fromkeys(model for curves in panels.values() for model in curves))
    for panel, (title, curves) in zip(axes, panels.items()):
        for model, (steps, evals, _) in curves.items():
            index = models.index(model)
            color, style = PALETTE[index % 8], LINES[index % 8]
            if steps:
                panel.plot(*zip(*steps), ls=style["ls"], lw=0.7, alpha=0.6, color=color)
            if evals:
                panel.plot(*zip(*evals), lw=1.4, color=color, **style)
        _, _, epoch_ends = next(iter(curves.values()))
        for end in epoch_ends:
            panel.axvline(end, color="#999999", lw=0.6, ls=":")
        panel.set(title=title, xlabel="tokens", ylabel="loss (nats per target token)")
        panel.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], color=PALETTE[index % 8], label=f"{model}: eval loss", **LINES[index % 8])
               for index, model in enumerate(models)]
    add_legend(figure, [*handles, Line2D([], [], color="#777777", lw=0.7, label="training loss"),
                        Line2D([], [], color="#999999", lw=0.6, ls=":", label="end of an epoch")])
    return figure


def loss_curve(stage: Stage) -> tuple[Points, Points, list[float]]:
    """The training and eval losses in a stage's log, as points (tokens, loss), and the tokens at which epochs end."""
    steps = [(line["tokens"], line["loss"]) for line in stage.log if "loss" in line]
    tokens = {line["step"]: line["tokens"] for line in stage.log if "tokens" in line} | {0: 0}
    total = max(tokens.values())
    evals = [(tokens.get(line["step"], total), line["eval_loss"]) for line in stage.log if "eval_loss" in line]
    settings = stage.run.get("settings", {})
    epochs = settings.get("num_train_epochs") if settings.get("task") and not settings.get("max_steps") else None
    return steps, evals, [total * number / epochs for number in range(1, math.floor(epochs))] if epochs else []


def plot_calibration(record: Record) -> Figure | None:
    """Accuracy over expected calibration error: a colour per benchmark, a marker per model, stages joined in order, the
    last one filled."""
    points: dict[str, dict[str, Points]] = {}
    for benchmark in (b for b in record.benchmarks if not b.part_of):
        for model, seeds in record.chains.items():
            stages = [(found.ece, 100 * found.accuracy) for _, stage in sorted(next(iter(seeds.values())).items())
                      if (found := stage.calibration.get(benchmark.name))]
            if stages:
                points.setdefault(benchmark.label or benchmark.name, {})[model] = stages
    if not points:
        return None
    figure, panel = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    models = list(dict.fromkeys(model for by_model in points.values() for model in by_model))
    for by_model, color in zip(points.values(), itertools.cycle(PALETTE)):
        for model, stages in by_model.items():
            x, y = zip(*stages)
            marker = MARKERS[models.index(model) % 8]
            panel.plot(x, y, lw=0.7, ms=5, mfc="white", color=color, marker=marker)
            panel.plot(x[-1:], y[-1:], ms=5, color=color, marker=marker)
    handles = [Line2D([], [], color=color, label=name) for name, color in zip(points, itertools.cycle(PALETTE))]
    handles += [Line2D([], [], color="#444444", ls="", marker=MARKERS[index % 8], mfc="white", label=model)
                for index, model in enumerate(models)]
    handles.append(Line2D([], [], color="#444444", ls="", marker="o", label="last stage"))
    panel.set(xlabel="expected calibration error", ylabel="accuracy (%)")
    panel.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in rows of two, and its axes."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 3.0 * rows), layout="constrained",
                                   squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def stage_labels(record: Record) -> list[str]:
    """The stages as labels of an axis."""
    return ["start" if stage == "m0" else stage for stage in record.stages]


def add_legend(figure: Figure, handles: list) -> None:
    """Adds a legend in one row below the panels."""
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
