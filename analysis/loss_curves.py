"""Curves of held-out loss over training compute."""
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

# The points of a run: (FLOPs spent, held-out loss in nats per token).
Curve = list[tuple[float, float]]


def curve_of_log(log: Iterable[Mapping[str, Any]]) -> Curve:
    """The evaluations of a pretraining run, given the lines of its metrics.jsonl; empty if there are none."""
    return [(float(step["flops"]), float(step["eval_loss"])) for step in log
            if step.get("flops") is not None and step.get("eval_loss") is not None]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several runs, at the FLOPs of the first one's points. Losses between points are interpolated, unless
    all runs have the same points: growth in stages has two at the same FLOPs, before and after it grows."""
    grids, losses = zip(*(zip(*curve) for curve in curves))
    if len(set(grids)) > 1:
        losses = [np.interp(grids[0], grid, values) for grid, values in zip(grids, losses)]
    return list(zip(grids[0], np.mean(losses, axis=0).tolist()))


def flops_to_loss(curve: Curve, loss: float) -> float | None:
    """The FLOPs at which a curve first reaches a loss, interpolated linearly; None if it never does."""
    if curve[0][1] <= loss:
        return curve[0][0]
    for (start, above), (stop, below) in zip(curve, curve[1:]):
        if below <= loss < above:
            return start + (stop - start) * (above - loss) / (above - below)
    return None


def draw_loss_curves(panel: Axes, curves: Mapping[str, Sequence[Curve]],
                     styles: Mapping[str, dict[str, Any]]) -> list[Artist]:
    """Draws a thick line for the mean of each model's runs, and a thin one for each run if there are several.

    The range of the losses is that of the evaluations after a tenth of the compute and after the first one of a run,
    which may be much higher. Returns the handles of a legend, with the final losses.
    """
    handles: list[Artist] = []
    total = max(curve[-1][0] for runs in curves.values() for curve in runs)
    for name, runs in curves.items():
        for curve in runs if len(runs) > 1 else ():
            panel.plot(*zip(*curve), lw=0.5, alpha=0.5, color=styles[name]["color"], ls=styles[name].get("ls", "-"))
        average, several = mean_curve(runs), f", mean of {len(runs)}" if len(runs) > 1 else ""
        label = f"{name}: {average[-1][1]:.3f} at the end{several}"
        handles += panel.plot(*zip(*average), lw=1.8, label=label, **styles[name])
    visible = [loss for runs in curves.values() for curve in runs
               for flops, loss in curve[1:] or curve if flops >= 0.1 * total]
    margin = 0.05 * (max(visible) - min(visible)) or 0.1
    panel.set(xlim=(0, (total or 1) * 1.01), ylim=(min(visible) - margin, max(visible) + margin),
              xlabel="training compute, base included (FLOPs, 6ND)", ylabel="held-out loss (nats per token)")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid()
    return handles
