"""The figures of a report, from what report.py computes; each is written as PNG and SVG."""
import functools
import math

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.files import explain_os_errors

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00"]

STYLES = ["-", "--", ":", "-."]

MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]

HATCHES = ["", "//", "..", "xx"]


def drawing(function):
    """A function that draws with these settings of matplotlib, and leaves those of its caller as they are."""
    @functools.wraps(function)
    def drawn(*args, **options):
        with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "report", "axes.spines.top": False,
                                "axes.spines.right": False}):
            return function(*args, **options)
    return drawn


def save(figure, path):
    """Writes a figure as path.png and path.svg."""
    with explain_os_errors(path):
        figure.savefig(f"{path}.png", dpi=160)
        figure.savefig(f"{path}.svg", metadata={"Date": None})
    pyplot.close(figure)


def grid(count, width=3.6, height=3.0):
    """A figure with so many panels, in rows of two; returns it and its axes as a flat list."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained",
                                   squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


@drawing
def benchmarks_over_stages(path, curves, stages):
    """One panel a category, a colour a benchmark, a line style a model, with 95% intervals.

    curves: {category: {benchmark: {model: [Estimate or None]}}}; stages: names along the x axis.
    """
    figure, axes = grid(len(curves))
    models = list(dict.fromkeys(model for names in curves.values() for found in names.values() for model in found))
    for panel, (category, names) in zip(axes, curves.items()):
        for colour, found in enumerate(names.values()):
            for model, values in found.items():
                style = models.index(model)
                points = [(x + 0.08 * style, 100 * value.value, 100 * (value.interval[1] - value.value))
                          for x, value in enumerate(values) if value]
                if points:
                    x, y, error = zip(*points)
                    panel.errorbar(x, y, [0 if math.isnan(e) else e for e in error], capsize=2, lw=1.4, elinewidth=0.6,
                                   ls=STYLES[style % 4], marker=MARKERS[style % 8], ms=4, color=PALETTE[colour % 8])
        handles = [Line2D([], [], color=PALETTE[index % 8], label=name) for index, name in enumerate(names)]
        panel.legend(handles=handles, frameon=False, fontsize=7, title=category, loc="lower center",
                     bbox_to_anchor=(0.5, 1), ncols=min(3, len(handles)), title_fontsize=10)  # beside no curve
        panel.set(xticks=range(len(stages)), ylabel="figure (%)")
        panel.set_xticklabels(stages, rotation=30, ha="right")
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], color="#444444", ls=STYLES[index % 4], marker=MARKERS[index % 8], ms=4, label=model)
               for index, model in enumerate(models)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(models), frameon=False)
    save(figure, path)


@drawing
def forgetting_by_category(path, bars):
    """Bars of FG a category and model, with 95% intervals and the values written on them.

    bars: {category: {model: Estimate or None}}.
    """
    models = list(dict.fromkeys(model for found in bars.values() for model in found))
    figure, panel = pyplot.subplots(figsize=(1.6 + 1.5 * len(bars), 3.6), layout="constrained")
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        for place, found in enumerate(bars.values()):
            estimate = found.get(model)
            if estimate is None:
                continue
            x, spread = place + (index - (len(models) - 1) / 2) * width, estimate.interval[1] - estimate.value
            panel.bar(x, estimate.value, width * 0.92, color=PALETTE[index % 8], hatch=HATCHES[index % 4],
                      edgecolor="white", yerr=None if math.isnan(spread) else spread,
                      error_kw={"lw": 0.8, "capsize": 3})
            top = estimate.value + (0 if math.isnan(spread) else math.copysign(spread, estimate.value))
            panel.annotate(f"{estimate.value:z.1f}", (x, top), (0, math.copysign(3, estimate.value)),
                           textcoords="offset points", ha="center", va="bottom" if estimate.value >= 0 else "top")
    panel.axhline(0, color="#000000", lw=0.8)
    panel.margins(y=0.15)
    panel.set(xticks=range(len(bars)), ylabel="FG (%), positive is forgetting")
    panel.set_xticklabels(bars)
    handles = [Patch(facecolor=PALETTE[index % 8], hatch=HATCHES[index % 4], edgecolor="white", label=model)
               for index, model in enumerate(models)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(models), frameon=False)
    save(figure, path)


@drawing
def heat_maps(path, panels, rows, columns, colours, label, form="{:.0f}", scale=None):
    """Heat maps side by side with one colour scale, values written in the cells.

    panels: {title: matrix of values or None}, rows by columns; scale: (lowest, highest) of the colours, none: each
    column from its lowest value to its highest.
    """
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.7 + len(panels) * (0.4 + 0.85 * len(columns)),
                                                            max(2.6, 1.4 + 0.32 * len(rows))),
                                   layout="constrained", squeeze=False, sharey=True)
    flat = [[value for matrix in panels.values() for value in (line[column] for line in matrix) if value is not None]
            for column in range(len(columns))]
    for panel, (title, matrix) in zip(axes.flat, panels.items()):
        shades = [[math.nan if value is None else value if scale else
                   (value - min(flat[column])) / ((max(flat[column]) - min(flat[column])) or 1)
                   for column, value in enumerate(line)] for line in matrix]
        low, high = scale or (0, 1)
        image = panel.imshow(shades, cmap=colours, vmin=low, vmax=high, aspect="auto")
        for y, line in enumerate(matrix):
            for x, value in enumerate(line):
                if value is None:
                    continue
                red, green, blue, _ = image.cmap(image.norm(shades[y][x]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                panel.text(x, y, form.format(value), ha="center", va="center", fontsize=8,
                           color="white" if dark else "black")
        panel.set(title=title, xticks=range(len(columns)), yticks=range(len(rows)))
        panel.set_xticklabels(columns, rotation=30, ha="right")
        panel.set_yticklabels(rows)
        panel.spines[:].set_visible(False)
    if scale:
        figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    else:
        figure.supxlabel(label, fontsize=8)
    save(figure, path)


@drawing
def losses(path, runs):
    """Training and eval loss over tokens, a panel a stage, with borders between epochs.

    runs: {stage: {model: (steps [(tokens, loss)], evals [(tokens, loss)], tokens at the ends of epochs)}}.
    """
    figure, axes = grid(len(runs))
    models = list(dict.fromkeys(model for found in runs.values() for model in found))
    for panel, (title, found) in zip(axes, runs.items()):
        for model, (steps, evals, _) in found.items():
            colour, style = PALETTE[models.index(model) % 8], STYLES[models.index(model) % 4]
            if steps:
                panel.plot(*zip(*steps), style, lw=0.7, alpha=0.6, color=colour)
            if evals:
                panel.plot(*zip(*evals), style + MARKERS[models.index(model) % 8], ms=4, lw=1.4, color=colour)
        for border in next(iter(found.values()))[2]:
            panel.axvline(border, color="#999999", lw=0.6, ls=":")
        panel.set(title=title, xlabel="tokens", ylabel="loss (nats a target token)")
        panel.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], color=PALETTE[index % 8], ls=STYLES[index % 4], marker=MARKERS[index % 8], ms=4,
                      label=f"{model}: eval loss")
               for index, model in enumerate(models)]
    handles += [Line2D([], [], color="#777777", lw=0.7, label="training loss"),
                Line2D([], [], color="#999999", lw=0.6, ls=":", label="end of an epoch")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, path)


@drawing
def accuracy_over_calibration(path, points):
    """Accuracy against expected calibration error: a colour a benchmark, a marker a model, stages joined in order; the
    last stage is filled. points: {benchmark: {model: [(ece, accuracy)]}}."""
    figure, panel = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    models = list(dict.fromkeys(model for found in points.values() for model in found))
    for colour, (_, found) in enumerate(points.items()):
        for model, places in found.items():
            x, y = zip(*places)
            style = {"color": PALETTE[colour % 8], "marker": MARKERS[models.index(model) % 8]}
            panel.plot(x, y, lw=0.7, ms=5, mfc="white", **style)
            panel.plot(x[-1:], y[-1:], ms=5, **style)
    handles = [Line2D([], [], color=PALETTE[index % 8], label=name) for index, name in enumerate(points)]
    handles += [Line2D([], [], color="#444444", ls="", marker=MARKERS[index % 8], mfc="white", label=model)
                for index, model in enumerate(models)]
    handles.append(Line2D([], [], color="#444444", ls="", marker="o", label="last stage"))
    panel.set(xlabel="expected calibration error", ylabel="accuracy (%)")
    panel.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    save(figure, path)
