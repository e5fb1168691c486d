"""Do both models of a pair profit equally from a method against forgetting?

A profit is how much more a model forgets with the method than with the baseline, so that less is better. It depends on
how much was learned: both models are compared at the same losses on the new task.
"""
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from analysis.contrasts import matched_difference
from analysis.inference import PairedDifference, holm
from analysis.matching import match
from analysis.method_plane import difference_of, has_results
from analysis.pair_tables import p_text, range_text, with_interval
from analysis.pairs import Study
from analysis.record import ModelPair
from analysis.stages import method_title
from analysis.tables import Section
from common.formatting import markdown_table


class Profit(NamedTuple):
    """How much more each of two models forgets with a method than with the baseline, in one pair."""
    one: float
    two: float
    width: float = 0.0  # of the range of losses over which both are means


def comparable_studies(studies: Mapping[str, Study], pair: ModelPair) -> tuple[Study, ...]:
    """The studies of both models if they have several pairs; otherwise empty."""
    both = tuple(studies[model] for model in pair if model in studies)
    return both if len(both) == 2 and all(study.unit == "pair" and len(study.pairs) > 1 for study in both) else ()


@functools.cache
def profits(studies: tuple[Study, ...], method: str, measure: str) -> dict[int, Profit]:
    """{pair: Profit} of a method, for the pairs in which both models have one. With several learning rates at the same
    losses on the new task: those that all four curves of a pair reach."""
    if not all(study.matches_learning for study in studies):
        first, second = (difference_of(study, method, measure) for study in studies)
        return {pair: Profit(first.of_pairs[pair].value, second.of_pairs[pair].value)
                for pair in sorted(first.of_pairs.keys() & second.of_pairs.keys())} if first and second else {}
    found = {}
    for pair in sorted(set(studies[0].pairs) & set(studies[1].pairs)):
        curves = [[study.curve(measure, pair, name, study.last) for name in (method, study.reference)]
                  for study in studies]
        if not all(len(curve[0]) for of_model in curves for curve in of_model):
            continue
        lows, highs = zip(*(match(with_method[0], without[0]).common for with_method, without in curves))
        low, high = max(lows), min(highs)
        one, two = (matched_difference(with_method, without, (low, high)) for with_method, without in curves)
        if one and two:
            found[pair] = Profit(one.value, two.value, high - low)
    return found


def common_methods(both: Sequence[Study]) -> list[str]:
    """The methods that both models were trained with, without the baseline."""
    return [method for method in both[0].models if method in both[1].models and method != both[0].reference]


def left_out_of_profits(studies: Mapping[str, Study], pair: ModelPair, measure: str) -> list[str]:
    """Sentences on the pairs that have results of both models with a method and without, and no profits."""
    if not (both := comparable_studies(studies, pair)):
        return []
    lines = []
    for method in common_methods(both):
        found = profits(both, method, measure)
        lines += [f"{both[0].name_of(number)} is left out of the profits of {method}: the curves of both models, with "
                  "the method and without, reach no common new-task loss" for number in both[0].pairs
                  if number not in found and all(has_results(study, measure, number, name) for study in both
                                                 for name in (method, study.reference))]
    return lines


def profit_section(studies: Mapping[str, Study], pair: ModelPair, measure: str) -> list[Section]:
    """The section on whether both models of a pair profit equally from the methods. Empty without several pairs."""
    if not (both := comparable_studies(studies, pair)):
        return []
    found = {method: of_pairs for method in common_methods(both) if (of_pairs := profits(both, method, measure))}
    differences = {method: PairedDifference(tuple(round(profit.one - profit.two, 12) for profit in of_pairs.values()))
                   for method, of_pairs in found.items()}
    corrected = dict(zip(found, holm([difference.p for difference in differences.values()])))
    matched = all(study.matches_learning for study in both)
    rows = []
    for method, of_pairs in found.items():
        one, two, widths = zip(*of_pairs.values())
        difference = differences[method]
        rows.append([method, with_interval(PairedDifference(one)), with_interval(PairedDifference(two)),
                     with_interval(difference), p_text(difference.p), p_text(corrected[method]),
                     f"{difference.smallest_detectable:.3g}" if difference.n > 1 else "–", difference.n,
                     range_text([min(widths), max(widths)]) if matched else "–"])
    where = " at losses on the new task that both models reach with and without the method" if matched else ""
    note = (f"The {measure} with a method less that with {method_title(both[0].reference)}, for each model{where}, and "
            "the difference of both, with 95% intervals over the pairs that have both. Holm's p is corrected for the "
            "number of methods. Detectable: the smallest true difference found with 80% power. Width: of the range of "
            "losses that a pair is compared over, from the narrowest to the widest pair.\n\n")
    head = ["method", *pair, " − ".join(pair), "p", "p (Holm)", "detectable", "pairs", "width"]
    return [("Do both models profit equally", note + markdown_table(head, rows))] if rows else []
