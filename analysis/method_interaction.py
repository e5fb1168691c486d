"""Interaction of method and model: for each pair, the forgetting with a method minus that with the baseline, for both
models, and the difference of these two effects (negative: the method helps the grown model more).

An effect depends on how much was learned: both models are compared at the same losses on the new task.
"""
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from analysis.contrasts import matched_difference
from analysis.difference_text import p_text, range_text, with_interval
from analysis.inference import PairedDifference, holm
from analysis.matching import match
from analysis.method_plane import difference_of, has_results
from analysis.pairs import Study
from analysis.record import ComparedModels
from analysis.stages import method_title
from analysis.tables import Section
from common.formatting import markdown_table


class MethodEffects(NamedTuple):
    """The effects of a method on both compared models: forgetting with the method minus that with the baseline."""
    grown: float
    reference: float
    width: float = 0.0  # of the range of losses on the new task over which both are means


def comparable_studies(studies: Mapping[str, Study], compared: ComparedModels) -> tuple[Study, ...]:
    """The studies of both models if they have several pairs; otherwise empty."""
    both = tuple(studies[model] for model in compared if model in studies)
    return both if len(both) == 2 and all(study.unit == "pair" and len(study.pairs) > 1 for study in both) else ()


@functools.cache
def method_effects(studies: tuple[Study, ...], method: str, measure: str) -> dict[int, MethodEffects]:
    """{pair: MethodEffects} of a method, for the pairs in which both models have results with it and without. With
    several learning rates, the effects are at the same losses on the new task: those that all four curves of a pair
    reach.

    studies: of the grown model and of the reference.
    """
    if not_alike(studies):
        return {}
    if not studies[0].matches_learning:
        grown, reference = (difference_of(study, method, measure) for study in studies)
        return {pair: MethodEffects(grown.by_pair[pair].value, reference.by_pair[pair].value)
                for pair in sorted(grown.by_pair.keys() & reference.by_pair.keys())} if grown and reference else {}
    effects = {}
    for pair in sorted(set(studies[0].pairs) & set(studies[1].pairs)):
        curves = [[study.curve(measure, pair, name, study.last) for name in (method, study.reference)]
                  for study in studies]
        if not all(len(curve[0]) for of_model in curves for curve in of_model):
            continue
        lows, highs = zip(*(match(with_method[0], without[0]).common for with_method, without in curves))
        low, high = max(lows), min(highs)
        one, two = (matched_difference(with_method, without, (low, high)) for with_method, without in curves)
        if one and two:
            effects[pair] = MethodEffects(one.value, two.value, high - low)
    return effects


def not_alike(studies: Sequence[Study]) -> bool:
    """Whether learning can be matched for one of the models only."""
    return len({study.matches_learning for study in studies}) > 1


def common_methods(both: Sequence[Study]) -> list[str]:
    """The methods that both models were trained with, without the baseline."""
    return [method for method in both[0].models if method in both[1].models and method != both[0].reference]


def left_out_of_interaction(studies: Mapping[str, Study], compared: ComparedModels, measure: str) -> list[str]:
    """Sentences on the pairs that have results of both models with a method and without, but no common losses."""
    if not (both := comparable_studies(studies, compared)):
        return []
    if not_alike(both):
        return [f"the effects of the methods on {both[0].of} and {both[1].of} are not compared: one was fine-tuned at "
                "several learning rates, and the other at one"]
    lines = []
    for method in common_methods(both):
        effects = method_effects(both, method, measure)
        lines += [f"{both[0].name_of(number)} is left out of the effects of {method}: the curves of both models, with "
                  "the method and without, reach no common new-task loss" for number in both[0].pairs
                  if number not in effects and all(has_results(study, measure, number, name) for study in both
                                                   for name in (method, study.reference))]
    return lines


def interaction_section(studies: Mapping[str, Study], compared: ComparedModels, measure: str) -> list[Section]:
    """The section on whether the effects of the methods differ between both models. Empty without several pairs."""
    if not (both := comparable_studies(studies, compared)):
        return []
    effects = {method: list(by_pair.values()) for method in common_methods(both)
               if (by_pair := method_effects(both, method, measure))}
    if not effects:
        return []
    differences = {method: PairedDifference(tuple(round(of_pair.grown - of_pair.reference, 12) for of_pair in of_pairs))
                   for method, of_pairs in effects.items()}
    corrected = dict(zip(effects, holm([difference.p for difference in differences.values()])))
    matched = all(study.matches_learning for study in both)
    rows = []
    for method, difference in differences.items():
        grown, reference, widths = zip(*effects[method])
        rows.append([method, *(with_interval(PairedDifference(tuple(np.round(values, 12).tolist())))
                               for values in (grown, reference)),
                     with_interval(difference), p_text(difference.p), p_text(corrected[method]),
                     f"{difference.smallest_detectable:.3g}" if difference.sd > 0 else "–", difference.n,
                     range_text([min(widths), max(widths)]) if matched else "–"])
    where = " at losses on the new task that both models reach with and without the method" if matched else ""
    note = (f"The {measure} with a method less that with {method_title(both[0].reference)}, for each model{where}, and "
            "the difference of both, with 95% intervals over the pairs that have both. Holm's p is corrected for the "
            "number of methods. Detectable: the smallest true difference found with 80% power, without this "
            "correction. Width: of the range of losses that a pair is compared over, from the narrowest to the widest "
            "pair.\n\n")
    head = ["method", *compared, " − ".join(compared), "p", "p (Holm)", "detectable", "pairs", "width"]
    return [("Does the effect of a method differ between the models", note + markdown_table(head, rows))]
