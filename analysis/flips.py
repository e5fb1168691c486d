"""Items of benchmarks that flip between right and wrong, with the effect of guessing taken off; metrics that are noise.

Guessing: an item is either known, and answered rightly, or guessed, and then right with the probability c = 1/options.
If n10 of N items were right at m0 and are wrong now, and n01 the reverse, then the share of known items fell by
(n10 - n01) / N / (1 - c). How much was forgotten and how much learned, each without guessing, cannot be told: it would
take guesses at two stages that are independent, and a model tends to guess an item the same way again.
"""
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.estimates import Estimate, estimate_of_items
from analysis.inference import ALPHA, mcnemar
from analysis.stages import BENCHMARKS, TASKS, Choices, Stage

# Options of benchmarks of lm-eval by the beginning of their names, for results without their items.
OPTIONS = {"mmlu_pro": 10, "mmlu": 4, "piqa": 2, "boolq": 2, "winogrande": 2, "hellaswag": 4, "mathqa": 5, "mutual": 4,
           "race": 4, "arc_": 4, "openbookqa": 4, "commonsense_qa": 5, "logiqa": 4, "social_iqa": 3, "sciq": 4,
           "copa": 2, "wsc273": 2}

FEWEST_EQUAL = 4  # fewest equal results that are not taken for coincidence


@dataclass(frozen=True)
class Flips:
    """The changes of the answers to the items of a benchmark.

    forgotten, learned: right at m0 and wrong later, and the reverse (n10, n01). net: the decrease in the share of
    known items, without guessing.
    """
    items: int
    forgotten: int
    learned: int
    net: Estimate

    @property
    def p(self) -> float:
        """The p-value of McNemar's exact test that flips in both directions are equally likely."""
        return mcnemar(self.forgotten, self.learned)


def count_flips(start: Choices, end: Choices, key: str) -> Flips:
    """The flips between two stages. key: identifies the items, so that models are compared item by item."""
    before, after = start.right > 0.5, end.right > 0.5
    net = (before.astype(float) - after) / (1 - start.chance)
    return Flips(len(before), int((before & ~after).sum()), int((~before & after).sum()),
                 estimate_of_items(net, (key, len(before))))


Measured = list[tuple[Stage, Estimate]]  # the values of one metric, with their stages


def by_metric(stages: Sequence[Stage]) -> dict[tuple[str, str], Measured]:
    """{("benchmarks" or "tasks", name): its values} of all stages."""
    values: dict[tuple[str, str], Measured] = {}
    for stage in stages:
        for kind, results in ((BENCHMARKS, stage.benchmarks), (TASKS, stage.tasks)):
            for name, estimate in results.items():
                values.setdefault((kind, name), []).append((stage, estimate))
    return values


def is_constant(name: str, measured: Measured) -> bool:
    """Whether a metric is the same in at least FEWEST_EQUAL results, as one that does not depend on the answers. Where
    the answers to the items are known, they have to be the same as well."""
    answers = {stage.choices[name].right.tobytes() for stage, _ in measured if name in stage.choices}
    numbers = {estimate.value for _, estimate in measured}
    return len(measured) >= FEWEST_EQUAL and len(numbers) == 1 and len(answers) <= 1


def constant_benchmarks(stages: Sequence[Stage]) -> frozenset[str]:
    """The names of the benchmarks with the same value for all models and stages."""
    return frozenset(name for (kind, name), measured in by_metric(stages).items()
                     if kind == BENCHMARKS and is_constant(name, measured))


def noise_flags(stages: Sequence[Stage]) -> dict[str, str]:
    """{metric: why its forgetting is noise}, a sentence for each metric that is the same for all models and stages, or
    at chance level everywhere or at the start."""
    found = {}
    for (kind, name), measured in by_metric(stages).items():
        numbers = [estimate.value for _, estimate in measured]
        chance = chance_of(name, [stage for stage, _ in measured]) if kind == BENCHMARKS else None
        two_sided = is_two_sided(name, measured[0][0])
        relation = "does not differ from chance" if two_sided else "is not above chance"
        unlearned = dict.fromkeys(stage.model if stage.pair is None else f"{stage.model} of pair {stage.pair}"
                                  for stage, estimate in measured
                                  if chance and not stage.number and is_at_chance([estimate], chance, two_sided))
        if is_constant(name, measured):
            found[name] = f"{name}: its forgetting is noise, since it is {numbers[0]:.4g} for all models and stages"
            if kind == BENCHMARKS:
                found[name] += "; it is not counted in its category unless --constant is true"
        elif chance and is_at_chance([estimate for _, estimate in measured], chance, two_sided):
            found[name] = f"{name}: its forgetting is noise, since it {relation} ({chance:.4g}) for any model and " \
                f"stage; the values are {min(numbers):.4g} to {max(numbers):.4g}"
        elif unlearned:
            found[name] = f"{name}: it cannot show forgetting of {', '.join(unlearned)}, whose start {relation} " \
                f"({chance:.4g})"
    return found


def chance_of(name: str, stages: Sequence[Stage]) -> float | None:
    """The value of a benchmark by guessing; None if the number of its options is unknown."""
    for stage in stages:
        if is_two_sided(name, stage):
            return 0.5  # one sentence of a pair
        if name in stage.choices:
            return stage.choices[name].chance
    return next((1 / options for beginning, options in OPTIONS.items() if name.startswith(beginning)), None)


def is_two_sided(name: str, stage: Stage) -> bool:
    """Whether values of a benchmark below chance mean something, as a share of stereotypes below one half does. An
    accuracy below chance is that of a model that has not learned the benchmark."""
    return stage.conditions.get((BENCHMARKS, name), {}).get("metric") == "pct_stereotype"


def is_at_chance(estimates: Sequence[Estimate], chance: float, two_sided: bool) -> bool:
    """Whether no value is above chance, or with `two_sided` differs from it, at a two-sided level that is corrected for
    their number (Bonferroni)."""
    critical = statistics.NormalDist().inv_cdf(1 - ALPHA / 2 / len(estimates))
    known = [(estimate.value - chance, critical * estimate.error) for estimate in estimates
             if not np.isnan(estimate.error)]
    return bool(known) and all((abs(gap) if two_sided else gap) <= margin for gap, margin in known)
