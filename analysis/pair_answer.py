"""The first sentences of a report on pairs of models: the answer by the primary measure."""
import math
import statistics
from collections.abc import Collection

from analysis.contrasts import Contrast, Difference
from analysis.difference_text import p_text, signed, with_interval
from analysis.inference import POWER, PairedDifference, detectable, units_needed
from analysis.measures import DECREASE
from analysis.pairs import Study
from analysis.stages import TEXT

ONE_PAIR = ("One pair of models cannot answer whether {0} forgets less than {1}: pairs differ, and the pair is the "
            "unit. Intervals are over the items and seeds of this pair, and not corrected for their number.")
FLOPS_TOLERANCE = 0.02  # relative difference of the FLOPs of two m0 that count as equal: of a few steps


def answer(study: Study, primary: str, effect: float) -> list[str]:
    """The first sentences of a report: the answer by the primary measure, its uncertainty, and where both models
    started. effect: the difference whose number of pairs is told."""
    difference = study.main_difference(primary)
    grown, reference = study.compared
    lines = [ONE_PAIR.format(grown, reference)] if len(study.pairs) == 1 else []
    if difference is None:
        if study.has_losses or len(study.pairs) > 1:
            where = " at an equal new-task loss" if study.matches_learning else ""
            lines.append(f"There is no answer by the {named(study, primary)}: no pair has it for both models{where}.")
        return lines
    estimate, unit = difference.estimate, difference.measure.unit
    if estimate.n > 1:
        direction = "less" if estimate.mean < 0 else "more"
        claim = f"{grown} forgets {direction} than {reference}" if estimate.is_significant else \
            f"{grown} and {reference} cannot be told apart"
        note = ""
        if not study.is_primary(primary):  # its p-value for a verdict is Holm's, in the table of all measures
            claim, note = f"{grown} compared with {reference}", ", not corrected for the number of measures"
        lines.append(f"{claim}: {conditions(study, difference)}, the {named(study, primary)} differs by "
                     f"{with_interval(estimate)} {unit} (95% interval; p {p_text(estimate.p, '= ')}{note}, n = "
                     f"{count(estimate.n, 'pair')}).")
        lines += uncertainty(difference, effect)
    else:
        lines.append(f"In {study.name_of(next(iter(difference.by_pair)))}, {conditions(study, difference)}, the "
                     f"{named(study, primary)} differs by {signed(estimate.mean)} {unit}.")
    lines.append(data_of(study, difference))
    for contrast in study.contrasts[1:]:
        control = study.difference(contrast, primary, study.last, difference.setting)
        if contrast.equal_loss and control:
            gap = start_difference(study, contrast, control.by_pair)
            left = f" (remaining difference {with_interval(gap)})" if gap.n else ""
            lines.append(f"With m0 of nearly equal held-out loss{left}, it differs by "
                         f"{with_interval(control.estimate)} {unit}, n = {count(control.estimate.n, 'pair')}.")
    if difference.is_matched and (other := study.difference(study.contrasts[0], primary, study.last, DECREASE)):
        lines.append(f"At an equal {DECREASE} since m0 instead, it differs by {with_interval(other.estimate)} {unit}, "
                     f"n = {count(other.estimate.n, 'pair')} (not the primary comparison).")
    return lines + start_losses(study, difference.by_pair)


def named(study: Study, measure: str) -> str:
    """The display name of the measure of the answer, with the last stage and the role of the measure."""
    role = "primary measure" if study.is_primary(measure) else \
        f"not the primary measure, which was named before the first run: {study.named}" if study.named else \
        "chosen for this report, and not known to have been named before the first run"
    return f"{measure} after {study.stages[-1]} ({role})"


def conditions(study: Study, difference: Difference) -> str:
    """The matching conditions of a difference, as text."""
    return f"at {'equal FLOPs and ' if has_equal_flops(study, difference.by_pair) else ''}{difference.learning}"


def has_equal_flops(study: Study, pairs: Collection[int]) -> bool:
    """Whether both m0 of each of some pairs were trained with the same FLOPs; False if they are unknown."""
    flops = [sorted(study.start_flops(model, [pair]) or 0 for model in study.compared) for pair in pairs]
    return all(0 < high <= (1 + FLOPS_TOLERANCE) * low for low, high in flops)


def uncertainty(difference: Difference, effect: float) -> list[str]:
    """The sentence on what the design could have found."""
    estimate, unit, parts = difference.estimate, difference.measure.unit, difference.components
    if not estimate.sd:
        return ["There is no test: the difference is the same in all pairs."]
    share = "" if parts is None or math.isnan(parts.item_share) else \
        f" The sample of items explains {parts.item_share:.0%} of the variance between pairs."
    pairs = count(estimate.n, "pair")
    low, high = (detectable(estimate.n) * sd for sd in estimate.sd_interval)
    needed, fewest, most = (units_needed(sd, effect) for sd in (estimate.sd, *estimate.sd_interval))
    return [f"{pairs} find a true difference of {estimate.smallest_detectable:.3g} {unit} ({low:.3g} to {high:.3g} "
            f"over the 95% interval of the standard deviation) with {POWER:.0%} power; one of {effect:g} takes "
            f"{needed:,} pairs ({fewest:,} to {most:,}).{share}"]


def data_of(study: Study, difference: Difference) -> str:
    """The sentence on the data behind the answer."""
    pairs = difference.by_pair
    items = len(next(iter(pairs.values())).values)
    left = [study.name_of(pair) for pair in study.pairs if pair not in pairs]
    seeds = f" (pretraining seeds {', '.join(map(str, pairs))})" if any(pairs) else ""
    sampled = f", {items} items" if items > 1 else ""
    rates = f", learning rates {', '.join(study.rates)}" if study.matches_learning else ""
    return (f"Data: {count(len(pairs), 'pair')}{seeds}{sampled}{rates}"
            + (f"; left out: {', '.join(left)}, see What is missing." if left else "."))


def count(number: int, noun: str) -> str:
    """A number with a noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def start_losses(study: Study, pairs: Collection[int]) -> list[str]:
    """The sentences on the held-out losses of both m0 in some pairs, and on their FLOPs if they are not equal."""
    by_pair = {pair: losses for pair, losses in study.start_losses(study.contrasts[0]).items() if pair in pairs}
    if not by_pair:
        return []
    texts = [f"{model} {statistics.fmean(losses):.4f}" for model, losses in zip(study.compared, zip(*by_pair.values()))]
    lines = [f"Held-out loss before fine-tuning: {', '.join(texts)} nats/token; difference "
             f"{with_interval(start_difference(study, study.contrasts[0], pairs))}."]
    grown, reference = (study.start_flops(model, pairs) for model in study.compared)
    if grown and reference and not has_equal_flops(study, pairs):
        lines.append(f"The FLOPs before fine-tuning are not equal: {study.compared[0]} {grown:.3g}, "
                     f"{study.compared[1]} {reference:.3g}.")
    return lines


def start_difference(study: Study, contrast: Contrast, pairs: Collection[int], name: str = TEXT) -> PairedDifference:
    """The difference between the losses of both m0 on held-out text or on a task, in the pairs that have both."""
    return PairedDifference(tuple(round(one - two, 12) for pair, (one, two) in study.start_losses(
        contrast, name).items() if pair in pairs))  # smaller differences are rounding errors
