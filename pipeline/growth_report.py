"""The table, the verdicts and the figure of a growth study: loss over FLOPs, grown and from scratch."""
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from analysis.figures import PALETTE, add_legend, make_panels, save_figure, styled
from analysis.inference import PairedDifference
from analysis.loss_curves import Curve, curve_of_log, draw_loss_curves, flops_to_loss, mean_curve
from common.files import UserError
from common.formatting import markdown_table
from common.metrics_log import read_log
from model.growth import OPERATORS
from pipeline.pretraining import DEPTH_OPERATORS

TRAINED_ON = "base-trained-on"  # the control: its folder, and its name in growth-study.json
LABELS = {"base": "base, before it is grown", TRAINED_ON: "base, trained further"}  # in the table and the figure
MIN_SEEDS = 3  # that a verdict on depth and growing takes
# As in the report's figures (MODELS in analysis/figures.py), where scratch is llm.
COLOURS = dict(zip(dict.fromkeys(["scratch", "stack", "base", "interleave", *DEPTH_OPERATORS]),
                   itertools.cycle([*PALETTE, "#777777"])))
COLOURS[TRAINED_ON] = COLOURS["base"]


def read_curve(path: Path) -> Curve:
    """The evaluations in a run's metrics.jsonl. Raises UserError if there are none."""
    if not (curve := curve_of_log(read_log(path))):
        raise UserError(f"{path} has no evaluations: remove {path.parent}, and the run is repeated")
    return curve


def summarize_runs(runs: Mapping[int, Mapping[str, Curve]]) -> list[dict]:
    """The rows of the table. runs: {seed: {name: curve}}, each seed with a "scratch".

    A row is {name, seeds, after_growth, final, difference, to_scratch, speed_up}, each a list over the seeds: losses in
    nats per token, and FLOPs. The difference is that of the final loss to scratch's. The speed-up is C_scratch / C - 1
    (Du et al., arXiv 2405.15319, section 3), None for a run that does not reach the final loss of scratch, or has it
    before any training.
    """
    rows = []
    for name in next(iter(runs.values())):
        curves = {seed: by_name[name] for seed, by_name in runs.items() if name in by_name}
        ends = [runs[seed]["scratch"][-1] for seed in curves]
        reached = [flops_to_loss(curve, loss) for curve, (_, loss) in zip(curves.values(), ends)]
        rows.append({"name": name, "seeds": list(curves), "final": [curve[-1][1] for curve in curves.values()],
                     "difference": [curve[-1][1] - loss for curve, (_, loss) in zip(curves.values(), ends)],
                     "after_growth": [curve[0][1] for curve in curves.values()], "to_scratch": reached,
                     "speed_up": [total / flops - 1 if flops else None for flops, (total, _) in zip(reached, ends)]})
    return rows


def format_over_seeds(values: Sequence[float | None], form: str) -> str:
    """Values over the seeds as text: a single one, or mean and standard deviation."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "not reached" if len(values) == 1 else f"not reached in {len(values) - len(numbers)} of {len(values)}"
    spread = f" ± {form.format(statistics.stdev(numbers)).lstrip('+')}" if len(numbers) > 1 else ""
    return form.format(statistics.mean(numbers)) + spread


def study_table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        name = row["name"]
        petaflops = [flops and flops / 1e15 for flops in row["to_scratch"]]
        lines.append([LABELS.get(name, name), len(row["seeds"]),
                      format_over_seeds(row["after_growth"], "{:.3f}") if name in OPERATORS else "–",
                      format_over_seeds(row["final"], "{:.3f}"),
                      format_over_seeds(row["difference"], "{:+.3f}") if name not in ("scratch", "base") else "–",
                      format_over_seeds(petaflops, "{:.4f}") if name != "base" else "–",
                      format_over_seeds(row["speed_up"], "{:+.0%}") if name not in ("scratch", "base") else "–"])
    return markdown_table(["model", "seeds", "loss after growth", "final loss", "difference to scratch",
                           "PFLOP to scratch's final loss", "speed-up"], lines)


def final_loss_difference(rows: Sequence[dict], name: str, other: str) -> PairedDifference:
    """The differences of the final losses of two models, of the seeds that both have."""
    one, two = (dict(zip(row["seeds"], row["final"])) for wanted in (name, other) for row in rows
                if row["name"] == wanted)
    return PairedDifference(tuple(one[seed] - two[seed] for seed in one if seed in two))


def compared_text(name: str, other: str, found: PairedDifference) -> str:
    """The sentence on a difference of final losses."""
    low, high = found.interval
    interval = f" [{low:+.3f}, {high:+.3f}]" if found.n > 1 else ""
    wins = sum(value < 0 for value in found.values)
    return (f"{name} − {LABELS.get(other, other)}: {found.mean:+.3f}{interval} nats per token, lower for {wins} of "
            f"{found.n} seeds.")


def payoff_sentence(what: str, differences: Sequence[PairedDifference]) -> str:
    """The sentence on whether something pays: all differences must be below 0 by their 95% intervals. It does not if
    one of them is above 0."""
    if all(one.interval[1] < 0 for one in differences):
        return f"{what} pays at this budget."
    if any(one.interval[0] > 0 for one in differences):
        return f"{what} does not pay at this budget."
    return f"There is no verdict on whether {what.lower()} pays at this budget: a 95% interval includes 0."


def conclusion(rows: Sequence[dict]) -> str:
    """Whether depth pays at this budget, and whether growing does: the final losses compared within seeds. Fewer than
    MIN_SEEDS seeds of all models that are compared give no verdict."""
    trained = {row["name"]: len(row["seeds"]) for row in rows}
    depth = final_loss_difference(rows, "scratch", TRAINED_ON)
    controls = {other: final_loss_difference(rows, "stack", other)
                for other in ("scratch", TRAINED_ON) if "stack" in trained}
    lines = [compared_text("scratch", TRAINED_ON, depth),
             *(compared_text("stack", other, found) for other, found in controls.items())]
    if depth.n < MIN_SEEDS:
        lines.append(f"No verdict: it takes at least {MIN_SEEDS} seeds, found {depth.n}. Give more --seeds.")
    else:
        lines.append(payoff_sentence("Depth", [depth]))
        if controls and trained["stack"] < MIN_SEEDS:
            lines.append(f"No verdict on growing: it takes at least {MIN_SEEDS} seeds of stack, found "
                         f"{trained['stack']}. Name stack in --repeated.")
        elif controls:
            lines.append(payoff_sentence("Growing", list(controls.values())))
    return "\n".join(f"- {line}" for line in lines) + "\n"


def style_of(name: str) -> dict[str, Any]:
    """Colour and line of a model: those of its operator and of its policy for the moments."""
    operator, _, policy = name.partition("-")
    lines = {"base": "--", "copied": "--", "zero": ":"}
    return {"color": COLOURS.get(name) or COLOURS[operator], "ls": lines.get(policy or name, "-")}


@styled
def plot_study(path: Path, runs: Mapping[int, Mapping[str, Curve]], title: str) -> None:
    """Plots loss over FLOPs of all runs to path.png and path.svg."""
    figure, (panel,) = make_panels(1, 7.2, 4.6)
    names = list(next(iter(runs.values())))
    curves = {LABELS.get(name, name): [by_name[name] for by_name in runs.values() if name in by_name] for name in names}
    styles = {LABELS.get(name, name): style_of(name) | {"marker": "o", "ms": 2} for name in names}
    handles = draw_loss_curves(panel, curves, styles)
    goal = mean_curve(curves["scratch"])[-1][1]
    panel.axhline(goal, color=COLOURS["scratch"], lw=0.8, ls=":")
    for name, seed_curves in curves.items():
        if name not in ("base", "scratch") and (reached := flops_to_loss(mean_curve(seed_curves), goal)) is not None:
            panel.plot(reached, goal, "D", ms=7, color=styles[name]["color"], mec="white")
    panel.set_title(title)
    add_legend(figure, [*handles, Line2D([], [], ls="", marker="D", ms=7, color="#777777", mec="white",
                                         label="reaches scratch's final loss")])
    save_figure(figure, path)
