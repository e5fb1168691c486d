"""The answer of a study of pairs of models, and its tables."""
import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from analysis.contrasts import Contrast, Difference
from analysis.estimates import Estimate, mean
from analysis.flips import Flips, count_flips
from analysis.inference import POWER, PairedDifference, detectable, holm, units_needed
from analysis.loss_curves import flops_to_loss
from analysis.measures import DECREASE, LEARNING, MATCHED_ON
from analysis.pairs import LEVEL_ENDING, Study, range_of_learning
from analysis.stages import TEXT
from analysis.tables import Section, format_estimate
from common.formatting import markdown_table

ONE_PAIR = ("One pair of models cannot answer whether {0} forgets less than {1}: pairs differ, and the pair is the "
            "unit. Intervals are over the items and seeds of this pair, and not corrected for their number.")
MOST_DECIMALS = 6  # of values that differ by rounding errors only
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
        lines.append(f"{claim}: {conditions(study, difference)}, the {named(study, primary)} differs by "
                     f"{with_interval(estimate)} {unit} (95% interval; p {p_text(estimate.p, '= ')}, n = "
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
    return [f"{pairs} find a true difference of {estimate.smallest_detectable:.3g} {unit} ({low:.3g} to {high:.3g}, as "
            f"far as {pairs} tell their spread) with {POWER:.0%} power; one of {effect:g} takes "
            f"{pairs_needed(estimate, effect)}.{share}"]


def pairs_needed(estimate: PairedDifference, effect: float) -> str:
    """The number of pairs that find a true difference, with its range by the interval of the standard deviation."""
    if not (needed := estimate.units_needed(effect)):
        return "– pairs"
    low, high = (units_needed(sd, effect) for sd in estimate.sd_interval)
    return f"{needed:,} pairs ({low:,} to {high:,})"


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


def signed(value: float) -> str:
    """A difference with three significant digits."""
    return "–" if math.isnan(value) else f"{value:+#.3g}".removesuffix(".") if value else "0"


def p_text(p: float, equals: str = "") -> str:
    """A p-value. equals: what precedes it unless it is too small to be written."""
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def range_text(ends: Iterable[float]) -> str:
    """The lowest and the highest of some losses as text."""
    low, high = (f"{end:.4f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def with_interval(estimate: PairedDifference) -> str:
    """A difference, with its 95% interval if there is one, with the decimals that two digits of its half width take."""
    if math.isnan(estimate.half_width) or not estimate.half_width:
        return signed(estimate.mean)
    decimals = 1 - math.floor(math.log10(estimate.half_width))  # two significant digits of the half width
    decimals = min(max(0, decimals), MOST_DECIMALS)
    while decimals < MOST_DECIMALS and not all(round(bound, decimals) for bound in estimate.interval):
        decimals += 1  # whether the interval contains 0 is seen
    value, low, high = (f"{number:+z.{decimals}f}" for number in (estimate.mean, *estimate.interval))
    return f"{value} [{low}, {high}]"


def differences_of(study: Study, primary: str, rate: str) -> tuple[Difference | None, list[Difference]]:
    """The primary difference, None if `primary` is not the primary measure, and all others after the last stage: at
    equal new-task loss where learning is matched, and those of the first contrast also at the shared rate."""
    first = study.main_difference(primary) if study.is_primary(primary) else None
    others = []
    for contrast in study.contrasts:
        for setting in dict.fromkeys([study.main_setting, rate]):
            if setting != study.main_setting and contrast is not study.contrasts[0]:
                continue
            others += [study.difference(contrast, name, study.last, setting) for name in study.measures
                       if name != setting]
    return first, [difference for difference in others if difference is not None and difference is not first]


def pair_sections(study: Study, primary: str, rate: str, effect: float) -> list[Section]:
    """The sections of a study. rate: the one at which models are compared without matching."""
    first, others = differences_of(study, primary, rate)
    differences = [*([first] if first else []), *others]
    if not differences:
        return flip_section(study, rate)
    corrected = [*([math.nan] if first else []), *holm([difference.estimate.p for difference in others])]
    rows = []
    for difference, p in zip(differences, corrected):
        measure, estimate = difference.measure, difference.estimate
        rows.append([f"{measure.name} (primary)" if difference is first else measure.name, measure.unit,
                     str(difference.contrast), learning_text(difference), estimate.n, with_interval(estimate),
                     p_text(estimate.p), p_text(p),
                     f"{estimate.smallest_detectable:.3g}" if estimate.sd > 0 else "–",
                     estimate.units_needed(effect) or "–"])
    note = (f"After {study.stages[-1]}; mean over the pairs, in brackets the 95% interval by Student's t. Positive is "
            f"more forgetting (or, for the {LEARNING}, less learning) by the first model. One measure is primary; all "
            "others are secondary, and Holm's p-value is corrected for their number. Detectable: the smallest true "
            f"difference found with {POWER:.0%} power, without this correction, if the standard deviation is as found. "
            "Held-out loss is that of text like that of pretraining. KL is KL(m0 ‖ stage), averaged over the same "
            "tokens as the loss. The loss on a task is that of the references of its test set; its rise for an earlier "
            "task is counted from the stage that learned it. The NLL (negative log-likelihood) of right options is "
            "normalised over the options.\n\n")
    table = markdown_table(["measure", "unit", "models", "learning", "pairs", "difference", "p", "p (Holm)",
                            "detectable", f"pairs for {effect:g}"], rows)
    return [("Differences between the models", note + table), *stage_section(study, primary),
            *match_section(study), *pretraining_section(study), *start_section(study), level_section(study, primary),
            *flip_section(study, rate)]


def learning_text(difference: Difference) -> str:
    """The matching condition of a difference, as a cell of a table."""
    if difference.is_matched:
        return difference.learning
    return f"rate {difference.setting}" if difference.setting else "not matched"


def stage_section(study: Study, primary: str) -> list[Section]:
    """The primary difference of each contrast by stage and by rate."""
    settings, rows = [*([LEARNING, DECREASE] if study.matches_learning else []), *study.rates], []
    for contrast, number, setting in itertools.product(study.contrasts, range(1, study.last + 1), settings):
        if difference := study.difference(contrast, primary, number, setting):
            learned = study.difference(contrast, LEARNING, number, setting) if setting != LEARNING else None
            rows.append([str(contrast), study.stages[number], learning_text(difference), difference.estimate.n,
                         with_interval(difference.estimate), p_text(difference.estimate.p),
                         with_interval(learned.estimate) if learned else "0 by design" if setting == LEARNING else "–"])
    table = markdown_table(["models", "stage", "learning", "pairs", primary, "p", LEARNING], rows)
    note = (f"In {study.measures[primary].unit}. The {DECREASE} is that since m0: the m0 of two models may differ on "
            "the task. These p-values are not corrected for their number.\n\n")
    return [("Difference by stage and rate", note + table)] if rows else []


def match_section(study: Study) -> list[Section]:
    """The ranges of the new-task loss, and of its decrease, over which the models were compared."""
    rows = []
    for contrast, learning in itertools.product(study.contrasts, MATCHED_ON) if study.matches_learning else ():
        matches = [match for pair in study.pairs
                   if (match := study.match(contrast, pair, study.last, learning=learning))]
        matched, cells = [match for match in matches if match.weights], ["–"] * 3
        if matched:
            means = np.mean([match.ranges for match in matched], axis=0)  # [2, 2]
            widths = [high - low for low, high in (match.common for match in matched)]
            cells = [*(range_of_learning(ends, learning) for ends in means), range_text([min(widths), max(widths)])]
        if matches:
            rows.append([str(contrast), learning, f"{len(matched)} of {len(matches)}", *cells])
    note = (f"The {LEARNING} after {study.stages[-1]}, and its decrease since m0, in nats per token: the lowest and "
            "the highest value that a model reaches, means over the pairs whose ranges overlap. A difference at equal "
            "learning is the mean over what both ranges of a pair have in common. Width: of this common range, from "
            "the narrowest to the widest pair. Forgetting is interpolated linearly between the learning rates. Where "
            "rates are far apart, this makes the model that learns less at the same rate look as if it forgot less; "
            "the intervals do not include that.\n\n")
    return [("Range of equal learning", note + markdown_table(
        ["models", "equal", "matched pairs", "range of the first", "range of the second", "width"], rows))] \
        if rows else []


def start_section(study: Study) -> list[Section]:
    """Losses of both m0 of each contrast, on held-out text and on the last task. The first shows whether growing paid;
    where the second differ, equal loss and equal decrease differ."""
    rows = []
    for contrast, (name, title) in itertools.product(study.contrasts, (
            (TEXT, "held-out text"), (study.last_task, study.last_task))):
        if by_pair := study.start_losses(contrast, name):
            estimate = start_difference(study, contrast, by_pair, name)
            rows.append([str(contrast), title, estimate.n, *(f"{statistics.fmean(losses):.4f}" for losses in zip(
                *by_pair.values())), with_interval(estimate), p_text(estimate.p)])
    return [("Losses before fine-tuning", "Of both m0, in nats per token; means over the pairs. Negative: the "
             "first model is better.\n\n" + markdown_table(
                 ["models", "loss on", "pairs", "first", "second", "difference", "p"], rows))] if rows else []


def pretraining_section(study: Study) -> list[Section]:
    """The pretraining of each m0 next to that of the reference in the same pair: final losses, and the speed-up."""
    rows, reference = [], study.reference
    for model in study.models:
        both = [curves for pair in study.pairs
                if all(curves := [study.pretraining_curve(pair, name) for name in (model, reference)])]
        if not both or model.endswith(LEVEL_ENDING):
            continue
        differences = [own[-1][1] - other[-1][1] for own, other in both]
        reached = [(flops_to_loss(own, other[-1][1]), other[-1][0]) for own, other in both]
        speed_ups = [total / flops - 1 for flops, total in reached if flops]
        is_faster = len(speed_ups) == len(both) and model != reference
        rows.append([model, len(both), f"{statistics.fmean(own[0][1] for own, _ in both):.3f}",
                     f"{statistics.fmean(own[-1][1] for own, _ in both):.3f}",
                     "–" if model == reference else
                     f"{with_interval(PairedDifference(tuple(differences)))} ({min(differences):+.3f} to "
                     f"{max(differences):+.3f})",
                     f"{min(speed_ups):+.0%} to {max(speed_ups):+.0%}" if is_faster else "–"])
    note = ("Held-out loss in nats per token, as evaluated during pretraining: means over the pairs, and the "
            f"differences to {reference} within the pairs, with their 95% intervals (smallest to largest). Speed-up: "
            "C / C' − 1 of the FLOPs C "
            f"of {reference} and the FLOPs C' at which a model reaches its final loss, those of a base included.\n\n")
    header = ["model", "pairs", "first loss", "final loss", f"difference to {reference}", "speed-up"]
    return [("Pretraining", note + markdown_table(header, rows))] if rows else []


def level_section(study: Study, primary: str) -> Section:
    """The measures of each model at each rate, means over the pairs."""
    names = list(dict.fromkeys([LEARNING, primary, *study.measures]))
    rows = []
    for model in study.models:
        for rate in study.rates:
            by_measure = [[items.value for pair in study.pairs
                           if (items := study.values(name, pair, model, rate, study.last))] for name in names]
            if pairs := max(map(len, by_measure)):
                rows.append([model, rate or "–", pairs, *(
                    f"{statistics.fmean(values):.4f}{'' if len(values) == pairs else f' (of {len(values)})'}"
                    if values else "–" for values in by_measure)])
    note = (f"After {study.stages[-1]}, means over the pairs that a model has, or (of) as many as have the measure; "
            "positive is forgetting. Rows with other numbers of pairs are not to be compared: the differences above "
            "are within pairs.\n\n")
    return "Forgetting and learning by model", note + markdown_table(["model", "rate", "pairs", *names], rows)


def flip_section(study: Study, rate: str) -> list[Section]:
    """The items of each benchmark that changed between right and wrong until the last stage."""
    rows = []
    for name in study.choice_benchmarks:
        for model in study.models:
            of_pairs = [seeds for pair in study.pairs if (seeds := flips_of(study, pair, model, rate, name))]
            of_chains = [flips for seeds in of_pairs for flips in seeds]
            if of_chains:
                rows.append([name, model, *(sum(numbers) for numbers in zip(*(
                    (flips.items, flips.forgotten, flips.learned) for flips in of_chains))),
                    p_text(of_chains[0].p) if len(of_chains) == 1 else "–",
                    share_text([mean(flips.net for flips in seeds) for seeds in of_pairs])])
    where = f" at the rate {rate}" if rate else ""
    note = (f"From m0 to {study.stages[-1]}{where}: items that were right and are wrong, and the reverse, summed over "
            "pairs and seeds. p: McNemar's exact test, of a single chain. Forgotten, net: the decrease in the share of "
            "items that are known rather than guessed, in percent, with the 95% interval from the pairs, or from the "
            "items of a single one.\n\n")
    return [("Items that flipped", note + markdown_table(
        ["benchmark", "model", "items", "right, then wrong", "wrong, then right", "p", "forgotten, net"],
        rows))] if rows else []


def flips_of(study: Study, pair: int, model: str, rate: str, name: str) -> list[Flips]:
    """The flips of a benchmark between m0 and the last stage, for each seed."""
    ends = [[chain[number].choices.get(name) if number in chain else None for number in (0, study.last)]
            for chain in study.chains(pair, model, rate)]
    return [count_flips(start, end, name) for start, end in ends if start and end]


def share_text(shares: Sequence[Estimate | None]) -> str:
    """A share in percent with its interval: over the pairs, or the items of a single one."""
    known = [share for share in shares if share is not None]
    if len(known) == 1:
        return format_estimate(known[0], scale=100)
    estimate = PairedDifference(tuple(100 * share.value for share in known))
    low, high = estimate.interval
    return f"{estimate.mean:.1f} [{low:.1f}, {high:.1f}]"
