"""Methods against forgetting on one plane: what is learned against what is forgotten, over learning rates.

A method is better than another if it forgets less at an equal loss on the new task. For one model a Study compares its
methods as it compares the models of a pair: the methods stand for the models. With several pairs of models the interval
of a difference is over the pairs, with several seeds of a single one over the seeds. One run of each method gives no
verdict, since runs that differ only in their seed differ, too; its interval is over the items.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.comparison import training_minutes
from analysis.contrasts import Contrast, Difference
from analysis.difference_text import p_text, range_text, with_interval
from analysis.inference import ALPHA, POWER, PairedDifference, holm
from analysis.measures import ItemValues, losses_at, task_at
from analysis.pair_answer import named
from analysis.pairs import Study
from analysis.stages import Stage, method_title
from analysis.tables import Section, table_of_values

START = "m0"  # a point of the plane, where nothing was learned or forgotten


@dataclass(frozen=True)
class Point:
    """A method at a learning rate: the loss on the new task and the forgetting, means over the pairs or seeds."""
    method: str
    rate: str
    loss: float
    forgetting: float


def method_study(stages: Sequence[Stage], model: str, baseline: str, named: str | None = None) -> Study | None:
    """The study of the methods of a model, in which methods stand for models, and the seeds of a single pair for pairs.
    None without the baseline and another method. named: the primary measure named before the first run.

    A method whose tasks are in another order than those of the baseline is compared up to the first that differs.
    """
    own = [stage for stage in stages if stage.model == model]
    seeds = sorted({stage.seed for stage in own if stage.number})
    unit = "seed" if len(seeds) > 1 and len({stage.pair for stage in own}) == 1 else "pair"
    if unit == "seed":
        own = [replace(stage, pair=seed) for stage in own for seed in seeds if stage.seed == seed or not stage.number]
    with_rates = {stage.method_name for stage in own if stage.number and stage.rate}
    without = sorted({stage.method_name for stage in own if stage.number} - with_rates) if with_rates else []
    own = [stage for stage in own if stage.method_name not in without or not stage.number]
    methods = list(dict.fromkeys(stage.method_name for stage in own if stage.number))
    if baseline not in methods or len(methods) < 2:
        return None
    methods.sort(key=lambda method: method != baseline)
    names = {stage.number: stage.name for stage in own if stage.method_name == baseline}
    others = sorted({(stage.method_name, stage.number, stage.name) for stage in own
                     if stage.number and stage.name != names.get(stage.number, stage.name)}, reverse=True)
    ends = {method: (number, name) for method, number, name in others}  # the first stage that differs
    own = [stage for stage in own if stage.number < ends.get(stage.method_name, (math.inf, ""))[0]]
    starts = [replace(stage, model=method, method=None) for stage in own if not stage.number for method in methods]
    trained = [replace(stage, model=stage.method_name, method=None) for stage in own if stage.number]
    study = Study(starts + trained, methods[1], baseline, of=model, named=named, unit=unit)
    study.left_out += [f"{model}, {method}: not compared at equal learning, since its stages are not in folders of "
                       "learning rates" for method in without]
    study.left_out += [f"{model}, {method}: not compared at equal learning from stage {number} on, which is {name}, "
                       f"and {names[number]} with {baseline}" for method, (number, name) in ends.items()]
    return study


def has_results(study: Study, measure: str, pair: int, method: str) -> bool:
    """Whether a method has results after the last stage in a pair, at any learning rate."""
    return len(study.curve(measure, pair, method, study.last)[0]) > 0


def finished_methods(study: Study, measure: str) -> list[str]:
    """The methods that have results after the last stage in any pair."""
    return [method for method in study.models if any(has_results(study, measure, pair, method) for pair in study.pairs)]


def common_pairs(study: Study, measure: str) -> list[int]:
    """The pairs in which all finished methods have results after the last stage."""
    return [pair for pair in study.pairs
            if all(has_results(study, measure, pair, method) for method in finished_methods(study, measure))]


def left_out_of_plane(study: Study, measure: str) -> list[str]:
    """Sentences on the methods and the pairs that the plane leaves out."""
    finished, common = finished_methods(study, measure), common_pairs(study, measure)
    methods = [method for method in study.models if method not in finished]
    pairs = [study.name_of(pair) for pair in study.pairs if pair not in common]
    return [f"the Pareto front of {study.of} is without {', '.join(left)}, {why} after {study.stages[-1]}"
            for left, why in ((methods, "without results"), (pairs, "in which not all methods have results")) if left]


def start_point(study: Study, measure: str) -> list[Point]:
    """m0 on the plane: its loss on the last task, mean over the common pairs. Empty if it is unknown."""
    starts = [losses_at(chains[0], 0, task_at(chains[0], study.last)) for pair in common_pairs(study, measure)
              if (chains := [chain for rate in study.rates for chain in study.chains(pair, study.reference, rate)
                             if study.last in chain])]
    known = [losses.loss for losses in starts if losses]
    return [Point(START, "", float(np.mean(known)), 0.0)] if known and len(known) == len(starts) else []


def points_of(study: Study, measure: str) -> list[Point]:
    """The methods at all learning rates, after the last stage: means over the pairs in which all finished methods have
    results, of the rates that a method has in all of them."""
    points, pairs = [], common_pairs(study, measure)
    for method in finished_methods(study, measure):
        curves = [study.curve(measure, pair, method, study.last) for pair in pairs]
        for rate in study.rates:
            of_pairs = [(x[rates.index(rate)], y[rates.index(rate)].value) for x, y, rates in curves if rate in rates]
            if pairs and len(of_pairs) == len(pairs):
                points.append(Point(method, rate, *np.mean(of_pairs, axis=0).tolist()))
    return points


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points than which no other learns at least as much and forgets less, or forgets as much and learns more, in
    the order of what they learn, the most first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.loss, point.forgetting)):
        place = point.loss, point.forgetting
        if not front or point.forgetting < front[-1].forgetting or place == (front[-1].loss, front[-1].forgetting):
            front.append(point)
    return front


def gap_of(study: Study, method: str, measure: str) -> PairedDifference | None:
    """The forgetting with a method minus that with the baseline, at equal loss on the new task: over several pairs or
    seeds, or over the items of a single run. None if they reach no common loss."""
    difference = difference_of(study, method, measure)
    if difference is None:
        return None
    return difference.estimate if len(study.pairs) > 1 else over_items(next(iter(difference.by_pair.values())))


def difference_of(study: Study, method: str, measure: str) -> Difference | None:
    """The difference of a method to the baseline of its study after the last stage, in each pair that has it."""
    return study.difference(contrast_of(study, method), measure, study.last, study.main_setting)


def contrast_of(study: Study, method: str) -> Contrast:
    """A method and the baseline."""
    return Contrast(method, study.reference, of=study.of)


def over_items(difference: ItemValues) -> PairedDifference:
    """The items of a single run as the units of a difference. The mean is that of the measure, and the deviations are
    those of a ratio of sums: an item counts by its weight, such as its tokens."""
    values = difference.value + difference.residuals
    return PairedDifference(tuple(values.round(12).tolist()))  # smaller differences are rounding errors


def compared_at(study: Study, method: str, measure: str) -> str:
    """The losses on the new task at which a method is compared with the baseline, as text; "–" if it is not. Over
    several pairs the means of both ends."""
    matches = [study.match(contrast_of(study, method), pair, study.last, measure) for pair in study.pairs]
    ends = [match.common for match in matches if match and match.weights is not None]
    if not ends or not study.matches_learning:
        return "–"
    return range_text(np.mean(ends, axis=0))


@dataclass(frozen=True)
class MethodComparison:
    """The methods of a model, compared with the baseline.

    Attributes:
        study: of the methods.
        measure: of forgetting.
        points: the methods at all learning rates.
        front: the Pareto front of these points and m0.
        gaps: {method: difference to the baseline}, without the methods that reach no common loss.
        corrected: {method: p-value corrected for the number of methods}; empty for a single pair or seed.
    """
    study: Study
    measure: str
    points: list[Point]
    front: list[Point]
    gaps: dict[str, PairedDifference]
    corrected: dict[str, float]


def compare_with_baseline(study: Study, measure: str) -> MethodComparison:
    """The comparison of all methods of a study with its baseline."""
    points = points_of(study, measure)
    gaps = {method: gap for method in study.models if method != study.reference
            and (gap := gap_of(study, method, measure))}
    corrected = dict(zip(gaps, holm([gap.p for gap in gaps.values()]))) if len(study.pairs) > 1 else {}
    front = pareto_front([*points, *start_point(study, measure)])
    return MethodComparison(study, measure, points, front, gaps, corrected)


def methods_verdict(comparison: MethodComparison) -> str:
    """The methods with significantly less or more forgetting than the baseline, as text."""
    if len(comparison.study.pairs) == 1:
        return "one run of each method gives no verdict, since runs that differ only in their seed differ, too"
    if not any(p <= 1 for p in comparison.corrected.values()):  # p is NaN without a spread
        return f"no method could be tested: it takes two {comparison.study.unit}s that can be compared and differ"
    significant = {method: comparison.gaps[method].mean for method, p in comparison.corrected.items() if p < ALPHA}
    groups = (("smaller with", [method for method, gap in significant.items() if gap < 0]),
              ("larger with", [method for method, gap in significant.items() if gap >= 0]))
    return "; ".join(f"{relation} {', '.join(map(method_title, methods))}" for relation, methods in groups if methods) \
        or "no method can be told apart from it"


def gap_text(comparison: MethodComparison, method: str) -> str:
    """The difference of a method to the baseline as a cell of the table."""
    study = comparison.study
    if method in comparison.gaps:
        return with_interval(comparison.gaps[method])
    is_apart = study.matches_learning and method != study.reference and any(
        study.match(contrast_of(study, method), pair, study.last, comparison.measure) for pair in study.pairs)
    return "no common new-task loss" if is_apart else "–"


def method_row(comparison: MethodComparison, method: str) -> list[str]:
    """The row of a method in the table; "–" stands for what is unknown."""
    study, corrected = comparison.study, comparison.corrected
    losses = [point.loss for point in comparison.points if point.method == method]
    minutes = training_minutes([chain for pair in study.pairs for rate in study.rates
                                for chain in study.chains(pair, method, rate)], study.last)
    return [method, range_text([min(losses), max(losses)]) if losses else "–",
            compared_at(study, method, comparison.measure) if method in comparison.gaps else "–",
            gap_text(comparison, method),
            p_text(corrected[method]) if method in corrected else "–",
            f"{gap.smallest_detectable:.3g}" if method in corrected and (gap := comparison.gaps[method]).sd else "–",
            ", ".join(point.rate or "yes" for point in comparison.front if point.method == method) or "–",
            "–" if math.isnan(minutes) else f"{minutes:.1f}"]


def interval_note(comparison: MethodComparison) -> str:
    """The words on the intervals of the differences; "" if there are none."""
    study = comparison.study
    if not any(gap.n > 1 for gap in comparison.gaps.values()):
        return ""
    if len(study.pairs) == 1:
        return ", with the 95% interval over the items, which tells how well these runs are measured (too narrow for " \
            "text in general, since windows of one document are alike)"
    return f", with the 95% interval over the {study.unit}s" + (
        " (for these items and this m0)" if study.unit == "seed" else "")


def table_note(comparison: MethodComparison, learning: str) -> str:
    """The note above the table. learning: the matching condition of the differences, as text."""
    study, measure = comparison.study, comparison.measure
    return (f"After {study.stages[-1]}: {measure} in {study.measures[measure].unit}, minus that of "
            f"{method_title(study.reference)} at {learning}{interval_note(comparison)}. "
            + ("Compared at: the losses on the last task that both reach, interpolated linearly between learning "
               "rates and taken as measured; differences at other losses are not comparable. Between rates that are "
               "far apart, linear interpolation overstates the forgetting if its curve is convex; the intervals do not "
               "include this. Forgetting is that of all stages. " if study.matches_learning else "")
            + ("p is corrected for the number of methods (Holm). Detectable: the smallest true difference found with "
               f"{POWER:.0%} power, without this correction, if the standard deviation is as found. "
               if comparison.corrected else "")
            + "On the Pareto front: the learning rates at which no other method and rate, nor m0, learned more and "
            "forgot less, by the measured values. Minutes of training are those of a chain.\n\n")


def plane_section(study: Study, measure: str) -> tuple[list[str], Section]:
    """The sentences and the section on the methods of a model. Verdicts are corrected for their number."""
    comparison, baseline = compare_with_baseline(study, measure), method_title(study.reference)
    learning = study.learning_text(study.main_setting, study.models)
    sentences = [f"{study.of}, {named(study, measure)}, at {learning}, compared with {baseline}: "
                 f"{methods_verdict(comparison)}."]
    if on_front := dict.fromkeys(point.method for point in comparison.front if point.method != START):
        sentences.append(f"On the Pareto front of what {study.of} learned and forgot, by the measured values: "
                         f"{', '.join(map(method_title, on_front))}.")
    head = ["method", "new-task loss", "compared at", f"{measure}, difference to {baseline}", "p", "detectable",
            "on the front", "minutes"]
    table = table_of_values(head, [method_row(comparison, method) for method in study.models])
    return sentences, (f"Learned and forgotten: {study.of}", table_note(comparison, learning) + table)
