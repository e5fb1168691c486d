"""Methods against forgetting on one plane: what is learned against what is forgotten, over learning rates.

A method is better than another if it forgets less at an equal loss on the new task. For one model a Study compares its
methods as it compares the models of a pair: the methods stand for the models. With several pairs of models the interval
of a difference is over the pairs, with several seeds of a single one over the seeds. One run of each method gives no
verdict, since runs that differ only in their seed differ, too; its interval is over the items.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from analysis.figures import PALETTE, add_legend, fold, make_panels, save_figure, styled, text_height
from analysis.inference import LEVEL, PairedDifference, holm
from analysis.measures import LEARNING, ItemValues
from analysis.pair_tables import p_text, with_interval
from analysis.pairs import Contrast, Difference, Study
from analysis.record import Pair
from analysis.record_figures import use_few_ticks
from analysis.stages import Stage
from analysis.tables import Section
from common.formatting import markdown_table

MARKERS = "osD^vPX*<>hd"


@dataclass(frozen=True)
class Point:
    """A method at a learning rate: the loss on the new task and the forgetting, means over the pairs or seeds."""
    method: str
    rate: str
    learned: float
    forgotten: float


def method_study(stages: Sequence[Stage], model: str, baseline: str) -> Study | None:
    """The study of the methods of a model, in which methods stand for models, and the seeds of a single pair for pairs.
    None without two methods."""
    own = [stage for stage in stages if stage.model == model]
    seeds = sorted({stage.seed for stage in own if stage.number})
    unit = "seed" if len(seeds) > 1 and len({stage.pair for stage in own}) == 1 else "pair"
    if unit == "seed":
        own = [replace(stage, pair=seed) for stage in own for seed in seeds if stage.seed == seed or not stage.number]
    methods = list(dict.fromkeys(stage.method_name for stage in own if stage.number))
    if baseline not in methods or len(methods) < 2:
        return None
    methods.sort(key=lambda method: method != baseline)
    starts = [replace(stage, model=method, method=None) for stage in own if not stage.number for method in methods]
    trained = [replace(stage, model=stage.method_name, method=None) for stage in own if stage.number]
    return Study(starts + trained, methods[1], baseline, of=model, unit=unit)


def common_pairs(study: Study, measure: str) -> list[int]:
    """The pairs in which all methods have results after the last stage."""
    return [pair for pair in study.pairs
            if all(len(study.curve(measure, pair, method, study.last)[0]) for method in study.models)]


def left_out_of_plane(study: Study, measure: str) -> list[str]:
    """A sentence on the pairs that the plane leaves out."""
    common = common_pairs(study, measure)
    left = [study.name_of(pair) for pair in study.pairs if pair not in common]
    return [f"the Pareto front of {study.contrasts[0].of} is without {', '.join(left)}, in which not all methods have "
            f"results after {study.stages[-1]}"] if left else []


def points_of(study: Study, measure: str) -> list[Point]:
    """The methods at all learning rates, after the last stage: means over the pairs in which all methods have results,
    of the rates that a method has in all of them."""
    found, pairs = [], common_pairs(study, measure)
    for method in study.models:
        curves = [study.curve(measure, pair, method, study.last) for pair in pairs]
        for rate in study.rates:
            of_pairs = [(x[rates.index(rate)], y[rates.index(rate)].value) for x, y, rates in curves if rate in rates]
            if pairs and len(of_pairs) == len(pairs):
                found.append(Point(method, rate, *np.mean(of_pairs, axis=0).tolist()))
    return found


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points than which no other learns at least as much and forgets less, or forgets as much and learns more, in
    the order of what they learn, the most first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.learned, point.forgotten)):
        place = point.learned, point.forgotten
        if not front or point.forgotten < front[-1].forgotten or place == (front[-1].learned, front[-1].forgotten):
            front.append(point)
    return front


def gap_of(study: Study, method: str, measure: str) -> PairedDifference | None:
    """How much more a method forgets than the baseline at equal loss on the new task: over several pairs or seeds, or
    over the items of a single run. None if they reach no common loss."""
    found = difference_of(study, method, measure)
    if found is None:
        return None
    return found.estimate if len(study.pairs) > 1 else over_items(next(iter(found.of_pairs.values())))


def difference_of(study: Study, method: str, measure: str) -> Difference | None:
    """The difference of a method to the baseline of its study after the last stage, in each pair that has it."""
    return study.difference(Contrast(method, study.pair[1], of=study.contrasts[0].of), measure, study.last,
                            study.main_rate)


def over_items(found: ItemValues) -> PairedDifference:
    """The items of a single run as the units of a difference. The mean is that of the measure, a ratio of sums, and
    the deviations are those of a ratio: an item counts by its weight, such as its tokens."""
    return PairedDifference(tuple((found.value + found.values - found.value * found.weights).tolist()))


def minutes_of(stages: Sequence[Stage], model: str, method: str) -> float:
    """The mean minutes of training of a chain of a method; NaN if they are not known of all stages of all chains."""
    last = max(stage.number for stage in stages)
    own = [stage for stage in stages if stage.number and (stage.model, stage.method_name) == (model, method)]
    chains = {(stage.pair, stage.rate, stage.seed) for stage in own}
    results = [stage.run.get("result", {}) for stage in own]
    seconds = [result.get("seconds", math.nan) + result.get("seconds_after", 0.0) for result in results]
    return math.fsum(seconds) / len(chains) / 60 if len(own) == last * len(chains) else math.nan


def plane_section(stages: Sequence[Stage], study: Study, measure: str) -> tuple[list[str], Section]:
    """The sentences and the section on the methods of a model. Verdicts are corrected for their number."""
    baseline, model, unit = study.pair[1], study.contrasts[0].of, study.measures[measure].unit
    points = points_of(study, measure)
    front, methods = pareto_front(points), study.models
    gaps = {method: gap_of(study, method, measure) for method in methods if method != baseline}
    known = {method: gap for method, gap in gaps.items() if gap}
    corrected = dict(zip(known, holm([gap.p for gap in known.values()]))) if len(study.pairs) > 1 else {}
    verdicts: dict[str, list[str]] = {"less with": [], "more with": []}
    for method, p in corrected.items():
        if p < LEVEL:
            verdicts["less with" if known[method].mean < 0 else "more with"].append(method)
    apart = {method for method in methods if study.matches_learning and method not in (*known, baseline) and any(
        study.match(Contrast(method, baseline, of=model), pair, study.last) for pair in study.pairs)}
    rows = []
    for method in methods:
        own, minutes = [point for point in points if point.method == method], minutes_of(stages, model, method)
        rows.append([method, f"{min(p.learned for p in own):.4f} to {max(p.learned for p in own):.4f}" if own else "–",
                     with_interval(known[method]) if method in known else
                     "no common new-task loss" if method in apart else "–",
                     p_text(corrected[method]) if method in corrected else "–",
                     ", ".join(point.rate or "yes" for point in front if point.method == method) or "–",
                     "–" if math.isnan(minutes) else f"{minutes:.1f}"])
    where = "equal new-task loss" if study.matches_learning else "one learning rate (learning not matched)"
    found = "; ".join(f"{verdict} {', '.join(names)}" for verdict, names in verdicts.items() if names)
    if len(study.pairs) == 1:
        found = "one run of each method gives no verdict, since runs that differ only in their seed differ, too"
    sentences = [f"{model}, {measure} at {where}, compared with {baseline}: "
                 f"{found or 'no method can be told apart from it'}."]
    if front:
        sentences.append(f"On the Pareto front of what {model} learned and forgot: "
                         + ", ".join(dict.fromkeys(point.method for point in front)) + ".")
    of_what = f"over the {study.unit}s" if len(study.pairs) > 1 else \
        "over the items, which tells how well these runs are measured"
    note = (f"After {study.stages[-1]}: {measure} in {unit}, minus that of {baseline} at {where}, with the 95% "
            f"interval {of_what}; each method over the losses that both reach, taken as measured. "
            + ("p is corrected for the number of methods (Holm). " if corrected else "")
            + "On the Pareto front: the learning rates at which no other method and rate learned more and forgot less, "
            "by the measured values. Minutes of training are those of a chain.\n\n")
    head = ["method", "new-task loss", f"{measure}, difference to {baseline}", "p", "on the front", "minutes"]
    return sentences, (f"Learned and forgotten: {model}", note + markdown_table(head, rows))


def profit_section(studies: dict[str, Study], pair: Pair, measure: str) -> list[Section]:
    """The section on whether both models of a pair profit equally from the methods. Empty without several pairs."""
    if not all(model in studies and studies[model].unit == "pair" and len(studies[model].pairs) > 1 for model in pair):
        return []
    baseline, rows = studies[pair[0]].pair[1], []
    for method in studies[pair[0]].models:
        one, two = (difference_of(studies[model], method, measure)
                    if method != baseline and method in studies[model].models else None for model in pair)
        common = sorted(one.of_pairs.keys() & two.of_pairs.keys()) if one and two else []
        if one and two and common:
            difference = PairedDifference(tuple(round(one.of_pairs[number].value - two.of_pairs[number].value, 12)
                                                for number in common))
            rows.append([method, with_interval(one.estimate), with_interval(two.estimate), with_interval(difference),
                         f"{difference.smallest_detectable:.3g}" if difference.n > 1 else "–", difference.n])
    note = (f"The {measure} with a method less that with {baseline}, for each model, and the difference of both in the "
            "pairs that have both, with 95% intervals over the pairs. Detectable: the smallest true difference found "
            "with 80% power.\n\n")
    head = ["method", *pair, " − ".join(pair), "detectable", "pairs"]
    return [("Do both models profit equally", note + markdown_table(head, rows))] if rows else []


@styled
def plot_planes(studies: dict[str, Study], folder: Path, measure: str) -> dict[str, str]:
    """Plots forgetting over the loss on the new task: a panel for each model, a curve for each method, and the Pareto
    front. Returns {file name without suffix: caption}, empty without points."""
    studies = {model: study for model, study in studies.items() if points_of(study, measure)}
    if not studies:
        return {}
    methods = list(dict.fromkeys(method for study in studies.values() for method in study.models))
    styles: dict[str, dict[str, Any]] = {method: {
        "color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)], "ms": 4.5,
                       "ls": ("-", "--", ":")[place // len(PALETTE) % 3]} for place, method in enumerate(methods)}
    figure, panels = make_panels(len(studies), 6.0 if len(studies) == 1 else 4.8, 3.6 + text_height(*studies))
    for panel, (model, study) in zip(panels, studies.items()):
        points = points_of(study, measure)
        front = pareto_front(points)
        panel.step([point.learned for point in front], [point.forgotten for point in front], where="post",
                   color="#BBBBBB", lw=5, zorder=0, solid_capstyle="round")
        for method in study.models:
            own = [(point.learned, point.forgotten) for point in points if point.method == method]
            if own:
                panel.plot(*zip(*own), lw=1.2, **styles[method])
        panel.set_title(fold(model, 4.0))
        panel.invert_xaxis()
        panel.grid()
        use_few_ticks(panel.xaxis, panel.yaxis)
    figure.supxlabel(f"{LEARNING} after the last stage (nats/token), to the right more was learned")
    figure.supylabel(fold(f"{measure} ({next(iter(studies.values())).measures[measure].unit})", 2.6))
    add_legend(figure, [*(Line2D([], [], label=method, **styles[method]) for method in methods),
                        Line2D([], [], color="#BBBBBB", lw=5, label="Pareto front")])
    save_figure(figure, folder / "methods")
    return {"methods": f"{measure} over {LEARNING}: a curve for each method, a point for each learning rate, and the "
                       "Pareto front."}
