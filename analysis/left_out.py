"""What a study of pairs does not use, and why, as sentences."""
import math
from collections.abc import Iterator

from analysis.contrasts import Contrast
from analysis.measures import DECREASE, LEARNING
from analysis.pairs import LEVEL_TOLERANCE, Study, level, range_of_learning


def without_model(study: Study, contrast: Contrast) -> Iterator[str]:
    """Sentences on the pairs in which a model of a contrast has no fine-tuned stages."""
    for pair in study.pairs:
        for model in study.models_of(contrast, pair) or ():
            if not any(study.chains(pair, model, rate) for rate in study.rates):
                yield f"{study.name_of(pair)} is left out of {contrast}: {model} has no fine-tuned stages in it"


def lacking_results(study: Study, contrast: Contrast, number: int) -> Iterator[str]:
    """Sentences on the pairs in which a model of a contrast lacks results: at all rates, or at rates that the other
    model has. For methods: at rates at which the method was started."""
    for pair in study.pairs if study.matches_learning else ():
        models = study.models_of(contrast, pair) or ()
        rates = {model: set(study.curve(LEARNING, pair, model, number)[2]) for model in models}
        for model, own in rates.items():
            if not own and any(study.chains(pair, model, rate) for rate in study.rates):
                yield (f"{study.name_of(pair)} is left out of {contrast} after {study.stages[number]}: {model} lacks "
                       "results of one seed or of all")
            expected = {rate for rate in study.rates if study.chains(pair, model, rate)} if contrast.of else \
                set().union(*rates.values())
            if own and (lacking := sorted(expected - own, key=float)):
                yield (f"{study.name_of(pair)}, {contrast} after {study.stages[number]}: {model} lacks results at "
                       f"the rate {', '.join(lacking)}")


def unmatched(study: Study, contrast: Contrast, number: int, learning: str = LEARNING) -> Iterator[str]:
    """Sentences on the pairs in which the models of a contrast reach no common value of one of MATCHED_ON."""
    for pair in study.pairs if study.matches_learning else ():
        overlap = study.match(contrast, pair, number, learning=learning)
        if overlap and overlap.weights is None:
            one, two = (f"{model} {range_of_learning(ends, learning)}" for model, ends in zip(
                study.models_of(contrast, pair) or (), overlap.ranges))
            names = "methods" if contrast.of else "models"
            yield (f"{study.name_of(pair)} is left out of {contrast} after {study.stages[number]}: the {names} reach "
                   f"no common {learning} ({one}, {two} nats per token)")


def not_level(study: Study) -> Iterator[str]:
    """Sentences on the models that were trained further to equal held-out loss and have not reached it."""
    for pair in study.pairs:
        for model, other in (study.compared, study.compared[::-1]):
            gap = study.start_gap(pair, level(model), other)
            if (pair, level(model)) in study.starts and not abs(gap) <= LEVEL_TOLERANCE:
                reason = f"its m0 differs from that of {other} by {gap:+.3f} nats per token" if math.isfinite(gap) \
                    else f"the held-out loss of its m0, or of that of {other}, is unknown"
                yield (f"{study.name_of(pair)}: {level(model)} is not used as the control at equal held-out loss, "
                       f"since {reason}")


def all_left_out(study: Study) -> list[str]:
    """Sentences on all that is not used, and on the pairs that could not be matched or lack a rate."""
    without = [line for contrast in study.contrasts for line in without_model(study, contrast)]
    numbers = range(study.last if study.of else 1, study.last + 1)  # methods are compared after the last stage only
    of_contrasts = [line for contrast in study.contrasts for number in numbers
                    for find in (lacking_results, unmatched) for line in find(study, contrast, number)]
    of_contrasts += [line for contrast in study.contrasts for number in range(1, study.last + 1) if not study.of
                     for line in unmatched(study, contrast, number, DECREASE)]
    return [*study.trained_otherwise, *study.left_out, *without, *not_level(study), *of_contrasts]
