"""The tables of a study of pairs of models."""
import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np

from analysis.contrasts import Difference
from analysis.difference_text import p_text, range_text, with_interval
from analysis.estimates import Estimate, mean
from analysis.flips import Flips, count_flips
from analysis.inference import POWER, PairedDifference, holm
from analysis.loss_curves import flops_to_loss
from analysis.measures import DECREASE, LEARNING, MATCHED_ON
from analysis.pair_answer import start_difference
from analysis.pairs import LEVEL_ENDING, Study, range_of_learning
from analysis.stages import TEXT
from analysis.tables import Section, format_estimate
from common.formatting import markdown_table


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
             "first model is better. These p-values are not corrected for their number.\n\n" + markdown_table(
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
