"""The figures of a report, plotted from a record."""
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from analysis.benchmark_catalog import task_metric
from analysis.comparison import Key, key_name
from analysis.estimates import Estimate
from analysis.figures import (
    LINES,
    PALETTE,
    add_legend,
    fold,
    make_panels,
    model_styles,
    save_figure,
    styled,
    text_height,
    text_width,
    use_few_ticks,
)
from analysis.flips import chance_of
from analysis.record import Record
from analysis.stages import Stage
from analysis.tables import BIAS
from common.files import parsing
from evaluation.suites import Benchmark

BARS: list[dict[str, Any]] = [{"facecolor": color, "hatch": hatch, "edgecolor": "white"}
                              for color, hatch in zip(PALETTE, ["", "//", "..", "xx"] * 2)]
MOST_EPOCHS = 50  # with more, their ends are not marked
GUESSING: dict[str, Any] = {"color": "#777777", "lw": 0.8, "ls": "--"}
SPAN = 10.0  # smallest range of the colour scale of a task's metric, in points

Points = list[tuple[float, float]]
Cells = dict[str, np.ndarray]  # model -> a heat map [rows, columns], NaN where nothing was measured


@styled
def plot_record(record: Record, folder: Path) -> dict[str, str]:
    """Plots all figures for which the record has results. Returns {file name without suffix: caption}.

    Nothing is written if one of them cannot be plotted.
    """
    key = first_common_key(record)
    chain, rate = f" ({key_name(key)})" if key and record.several_chains else "", record.at_rate
    smaller = f" Of {BIAS}, positive is a smaller share of stereotypes." if BIAS in record.categories else ""
    figures = {
        "benchmarks": (plot_benchmarks, f"Each benchmark over the stages{rate}, with the {record.interval_text}."),
        "forgetting": (plot_forgetting, f"FG by category{rate}, with the {record.interval_text}.{smaller}"),
        "bias": (plot_bias, f"Share of sentence pairs{rate} in which the stereotype is more probable (%); 50 is "
                 "balanced."),
        "tasks": (plot_tasks, f"Each task's metric at every stage{rate}; each column has its own colour scale, of at "
                  f"least {SPAN:.0f} points."),
        "losses": (plot_losses, f"Loss over tokens, a panel for each stage{chain}{', fine-tuned' * bool(rate)}{rate}."),
        "calibration": (plot_calibration, f"Accuracy against expected calibration error{rate}, stages joined in order, "
                        f"with growing marks{chain}.")}
    plotted = {name: figure for name, (plot, _) in figures.items() if (figure := plot(record))}
    for name, figure in plotted.items():
        save_figure(figure, folder / name)
    return {name: figures[name][1] for name in plotted}


def plot_benchmarks(record: Record) -> Figure | None:
    """Benchmarks over the stages with 95% intervals: a panel per benchmark, in the order of the categories.

    Like the functions below, returns None without results.
    """
    benchmarks = [benchmark for category in record.categories for benchmark in record.benchmarks_of(category)]
    if not benchmarks:
        return None
    stages = stage_labels(record)
    width = max(1.9, len(stages) * (text_width(*stages) + 0.08))
    titles = [benchmark_title(benchmark, width, f", {benchmark.metric} (%)") for benchmark in benchmarks]
    figure, panels = make_panels(len(benchmarks), width + 0.45, 1.2 + text_height(*stages) + text_height(*titles))
    styles, with_chance = model_styles(record.chains, LINES), False
    measured = [stage for group in record.chains.values() for chain in group.values() for stage in chain.values()]
    for panel, benchmark, title in zip(panels, benchmarks, titles):
        for index, (model, style) in enumerate(styles.items()):
            values = [record.benchmark_value(model, number, benchmark.name) for number in range(record.last + 1)]
            points = [(x + 0.12 * (index - (len(styles) - 1) / 2), 100 * value.value,
                       100 * (value.interval[1] - value.value)) for x, value in enumerate(values) if value]
            if points:
                x, y, error = zip(*points)
                panel.errorbar(x, y, [0 if math.isnan(e) else e for e in error], capsize=2, lw=1.2, elinewidth=0.6,
                               **style)
        if (chance := chance_of(benchmark.name, measured)) is not None:
            panel.axhline(100 * chance, **GUESSING)
            with_chance = True
        panel.set(title=title, xlim=(-0.5, record.last + 0.5))
        panel.set_xticks(range(record.last + 1), stages)
        use_few_ticks(panel.yaxis)
        panel.grid()
    handles: list[Artist] = [Line2D([], [], label=record.title(model), **style) for model, style in styles.items()]
    if with_chance:
        handles.append(Line2D([], [], label="by guessing", **GUESSING))
    add_legend(figure, handles)
    return figure


def plot_forgetting(record: Record) -> Figure | None:
    """FG by category as bars with 95% intervals and values."""
    models, categories = list(record.chains), [fold(category, 2.0) for category in record.categories]
    bars = {(place, index): estimate for place, category in enumerate(record.categories)
            for index, model in enumerate(models) if (estimate := record.category_fg(model, category))}
    if not bars:
        return None
    group = max(0.2 * len(models), text_height(*categories)) + 0.16
    figure, (panel,) = make_panels(1, 7.0, 0.6 + max(0.6, group * len(categories)))
    styles = model_styles(record.chains, BARS)
    for (place, index), estimate in bars.items():
        width = 0.8 / len(models)
        y = place + (index - (len(models) - 1) / 2) * width
        error = 0.0 if math.isnan(estimate.error) else estimate.interval[1] - estimate.value
        panel.barh(y, estimate.value, width * 0.92, xerr=error or None, error_kw={"lw": 0.8, "capsize": 2},
                   **styles[models[index]])
        side = 1 if estimate.value >= 0 else -1
        panel.annotate(f"{estimate.value:z.1f}", (estimate.value + side * error, y), (4 * side, 0),
                       textcoords="offset points", va="center", fontsize=8, ha="left" if side > 0 else "right")
    panel.axvline(0, color="#000000", lw=0.8)
    panel.margins(x=0.12)
    panel.set(xlabel="FG (%), positive is forgetting", ylim=(len(categories) - 0.5, -0.5))
    panel.set_yticks(range(len(categories)), categories)
    panel.grid(axis="x")
    panel.set_axisbelow(True)
    add_legend(figure, [Patch(label=record.title(model), **style) for model, style in styles.items()])
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
    shades = {model: (matrix - low) / np.maximum(high - low, SPAN) for model, matrix in cells.items()}
    figure, _ = plot_heat_maps(cells, shades, record.stages, [f"{task}\n{task_metric(task)}" for task in record.tasks],
                               "{:z.1f}", cmap="cividis", vmin=0, vmax=1)
    figure.supxlabel(f"colours: from the lowest value of a column to its highest, at least {SPAN:.0f} points")
    return figure


def plot_heat_maps(cells: Cells, shades: Cells, rows: Sequence[str], columns: Sequence[str], form: str,
                   **scale: Any) -> tuple[Figure, AxesImage]:
    """Heat maps, one per model, with the values in the cells. Returns the figure and the last heat map.

    shades: the values that give the colours. scale: the colour map and its limits, options of matplotlib's imshow.
    """
    rows = [fold(row, 1.6) for row in rows]
    values = [form.format(value) for matrix in cells.values() for value in matrix.flat]
    width = max(1.3, len(columns) * (text_width(*columns, *values) + 0.12))
    titles = [fold(model, width) for model in cells]
    height = max(1.0, len(rows) * max(0.26, text_height(*rows) + 0.04))
    figure, panels = make_panels(len(cells), width + 0.1, height + text_height(*columns) + text_height(*titles) + 0.4,
                                 margin=text_width(*rows) + 1.0)
    for panel, (model, matrix), title in zip(panels, cells.items(), titles):
        image = panel.imshow(shades[model], aspect="auto", **scale)
        for y, x in np.argwhere(~np.isnan(matrix)):
            red, green, blue, _ = image.cmap(image.norm(shades[model][y, x]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            panel.text(x, y, form.format(matrix[y, x]), ha="center", va="center", fontsize=8,
                       color="white" if dark else "black")
        panel.set_title(title)
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        cell = panel.get_subplotspec()
        panel.tick_params(length=0, labelleft=cell is None or cell.is_first_col())
        panel.spines[:].set_visible(False)
    return figure, image


def first_common_key(record: Record) -> Key | None:
    """The key of the first chain that all models have, or, if there is none, that the most models have."""
    counts = Counter(key for key in sorted({key for _, key, _ in record.all_chains()})
                     for group in record.chains.values() if key in group)
    return counts.most_common(1)[0][0] if counts else None


def value_of(estimate: Estimate | None) -> float:
    """The value of an estimate, NaN for None."""
    return math.nan if estimate is None else estimate.value


def plot_losses(record: Record) -> Figure | None:
    """Training and eval loss over tokens, a panel per stage."""
    curves: dict[str, dict[str, tuple[Points, Points, list[float]]]] = {}
    key = first_common_key(record)
    for number, name in enumerate(record.stages):
        for model, group in record.chains.items():
            stage = group.get(key, {}).get(number) if key else None
            if stage and stage.log:
                curves.setdefault(name, {})[model] = loss_curve(stage)
    if not curves:
        return None
    titles = [fold(name, 2.7) for name in curves]
    figure, panels = make_panels(len(curves), 3.2, 2.0 + text_height(*titles))
    styles = model_styles(record.chains, LINES)
    for panel, title, by_model in zip(panels, titles, curves.values()):
        for model, (steps, evals, _) in by_model.items():
            if steps:
                panel.plot(*zip(*steps), ls=styles[model]["ls"], lw=0.7, alpha=0.6, color=styles[model]["color"])
            if evals:
                panel.plot(*zip(*evals), lw=1.4, **styles[model])
        _, _, epoch_ends = next(iter(by_model.values()))
        for end in epoch_ends:
            panel.axvline(end, color="#999999", lw=0.6, ls=":")
        panel.set_title(title)
        use_few_ticks(panel.xaxis, panel.yaxis)
        panel.grid()
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("tokens of the stage, without those of a grown model's base")
    figure.supylabel("loss (nats per target token)")
    drawn = {model for by_model in curves.values() for model in by_model}
    handles = [Line2D([], [], label=f"{model}: eval loss", **style)
               for model, style in styles.items() if model in drawn]
    add_legend(figure, [*handles, Line2D([], [], color="#777777", lw=0.7, label="training loss"),
                        Line2D([], [], color="#999999", lw=0.6, ls=":", label="end of an epoch")])
    return figure


def loss_curve(stage: Stage) -> tuple[Points, Points, list[float]]:
    """The training and eval losses in a stage's log, as points (tokens, loss), and the tokens at which epochs end."""
    with parsing(str(stage.directory), "the directory of a run, with its run.json and metrics.jsonl"):
        tokens = {line["step"]: float(line["tokens"]) for line in stage.log if "tokens" in line} | {0: 0.0}
        total = max(tokens.values())
        steps = [(tokens[line["step"]], float(line["loss"])) for line in stage.log if line.get("loss") is not None]
        evals = [(tokens.get(line["step"], total), float(line["eval_loss"])) for line in stage.log
                 if line.get("eval_loss") is not None]
        settings = stage.run.get("settings", {})
        epochs = settings.get("num_train_epochs") if settings.get("task") and not settings.get("max_steps") else None
        return steps, evals, [total * number / epochs for number in range(1, math.ceil(epochs))] \
            if epochs and epochs <= MOST_EPOCHS else []


def plot_calibration(record: Record) -> Figure | None:
    """Accuracy over expected calibration error, a panel per benchmark: stages joined in order, with marks that grow,
    the last one filled."""
    curves: dict[str, dict[str, Points]] = {}
    key = first_common_key(record)
    benchmarks = {benchmark.name: benchmark for benchmark in record.benchmarks if not benchmark.part_of}
    for name in benchmarks:
        for model, group in record.chains.items():
            chain = group.get(key, {}) if key else {}
            points = [(found.ece, 100 * found.accuracy) for _, stage in sorted(chain.items())
                      if (found := stage.calibration.get(name))]
            if points:
                curves.setdefault(name, {})[model] = points
    if not curves:
        return None
    titles = [benchmark_title(benchmarks[name], 1.9) for name in curves]
    figure, panels = make_panels(len(curves), 2.4, 1.5 + text_height(*titles))
    styles = model_styles(record.chains, LINES)
    for panel, title, by_model in zip(panels, titles, curves.values()):
        for model, points in by_model.items():
            panel.plot(*zip(*points), lw=0.8, **styles[model] | {"marker": ""})
            for number, (x, y) in enumerate(points, 1):
                panel.plot(x, y, mfc=None if number == len(points) else "white",
                           **styles[model] | {"ms": 2 + 5 * number / len(points)})
        panel.set_title(title)
        use_few_ticks(panel.xaxis, panel.yaxis)
        panel.grid()
    figure.supxlabel("expected calibration error")
    figure.supylabel("acc (%)")
    drawn = {model for by_model in curves.values() for model in by_model}
    handles = [Line2D([], [], mfc="white", label=model, **style) for model, style in styles.items() if model in drawn]
    add_legend(figure, [*handles, Line2D([], [], color="#444444", ls="", marker="o", ms=4, label="last stage")])
    return figure


def benchmark_title(benchmark: Benchmark, width: float, ending: str = "") -> str:
    """A title of some width for a benchmark's panel: its name, and a line with its category."""
    return fold(benchmark.label or benchmark.name, width) + "\n" + fold(benchmark.category + ending, width)


def stage_labels(record: Record) -> list[str]:
    """The stages as labels of an axis, such as "m0", "m1\nsimp"."""
    return ["\n".join(fold(part, 0.7) for part in stage.split("-", 1)) for stage in record.stages]
