"""Pairs of models: does a grown model forget less than one from scratch, with a pair (a pretraining seed) as the unit?

Each measure is the change of one model since its own m0, item by item, so that a value less another is paired by item
and by pair. Learning is matched: models are compared at equal loss on the new task, see matching.py.
"""
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.comparison import Chain
from analysis.inference import PairedDifference, VarianceComponents, variance_components
from analysis.matching import Match, match
from analysis.record import find_benchmarks, make_chains
from analysis.results import BENCHMARKS, TEXT, Choices, ItemLosses, Stage
from common.files import UserError
from evaluation.conditions import shown, unlike

LEARNING = "new-task loss"  # the measure of learning, at which models are matched
PRIMARY = "rise of held-out loss"  # the default primary measure

TOKEN, NATS, BYTE, SHARE = "nats/token", "nats", "bits/byte", "share of items"  # units


@dataclass(frozen=True)
class ItemValues:
    """Values of items [N] whose mean is a measure's value. weights [N]: how much each item counts, with the mean 1."""
    values: np.ndarray
    weights: np.ndarray

    @property
    def value(self) -> float:
        """The measure's value."""
        return float(self.values.mean())


def weighted_sum(terms: Sequence[tuple[float, ItemValues]]) -> ItemValues:
    """A weighted sum of values of the same items."""
    return ItemValues(np.sum([weight * one.values for weight, one in terms], axis=0), terms[0][1].weights)


def pool(sets: Sequence[ItemValues]) -> ItemValues | None:
    """The mean over sets of items, each of which counts the same. None without a set."""
    total = sum(len(one.values) for one in sets)
    scales = [total / len(sets) / len(one.values) for one in sets]
    return ItemValues(np.concatenate([scale * one.values for scale, one in zip(scales, sets)]),
                      np.concatenate([scale * one.weights for scale, one in zip(scales, sets)])) if sets else None


Extract = Callable[[Chain, int], ItemValues | None]  # a measure of a chain after a stage; None if it was not measured


@dataclass(frozen=True)
class PairMeasure:
    """A measure of a chain of stages after one of them. Higher values of all but LEARNING are more forgetting."""
    name: str
    unit: str
    extract: Extract


def per_token(sums: np.ndarray, losses: ItemLosses) -> ItemValues:
    """Sums over the tokens of items as values per token, with the items' tokens as weights."""
    return ItemValues(sums / losses.tokens.mean(), losses.tokens / losses.tokens.mean())


def losses_at(chain: Chain, number: int, name: str) -> ItemLosses | None:
    """The losses of held-out text or of a task after a stage."""
    return chain[number].losses.get(name) if number in chain else None


def loss_rise(chain: Chain, name: str, before: int, after: int) -> ItemValues | None:
    """The rise of a loss from one stage to another."""
    start, end = losses_at(chain, before, name), losses_at(chain, after, name)
    return per_token(end.nll - start.nll, end) if start and end else None


def kl(chain: Chain, number: int, name: str) -> ItemValues | None:
    """The Kullback-Leibler divergence of a stage from m0."""
    losses = losses_at(chain, number, name)
    return per_token(losses.kl, losses) if losses and losses.kl is not None else None


def task_at(chain: Chain, number: int) -> str:
    """The task of a stage; "" if it is unknown."""
    return (chain[number].task or "") if number in chain else ""


def learning(chain: Chain, number: int) -> ItemValues | None:
    """The loss on the new task, after it was learned."""
    losses = losses_at(chain, number, task_at(chain, number))
    return per_token(losses.nll, losses) if losses else None


def earlier_tasks(chain: Chain, number: int) -> ItemValues | None:
    """The mean rise of the losses of earlier tasks since each was learned, as in backward transfer (Lopez-Paz and
    Ranzato, arXiv 1706.08840, eq. 3). None if one of them is missing."""
    learned = {task_at(chain, stage): stage for stage in range(1, number)}
    rises = [loss_rise(chain, task, stage, number) for task, stage in learned.items() if task != task_at(chain, number)]
    known = [rise for rise in rises if rise]
    return pool(known) if len(known) == len(rises) else None


def options_measure(names: Sequence[str], values_of: Callable[[Choices], np.ndarray | None], sign: int) -> Extract:
    """The mean change over benchmarks since m0 of a value of the right options, times `sign`."""
    def extract(chain: Chain, number: int) -> ItemValues | None:
        found = []
        for name in names:
            ends = [chain[stage].choices.get(name) if stage in chain else None for stage in (0, number)]
            start, end = (values_of(one) if one else None for one in ends)
            if start is None or end is None:
                return None
            found.append(ItemValues(sign * (end - start), np.ones(len(end))))
        return pool(found)
    return extract


OPTION_VALUES: list[tuple[str, str, Callable[[Choices], np.ndarray | None], int]] = [
    ("rise of right options' NLL", NATS, lambda choices: choices.nll, 1),
    ("rise of right options' bits per byte", BYTE, lambda choices: choices.bits_per_byte, 1),
    ("loss of accuracy", SHARE, lambda choices: choices.right, -1)]


def make_measures(stages: Sequence[Stage]) -> dict[str, PairMeasure]:
    """All measures by name: of losses, then of the multiple-choice benchmarks of each category."""
    found = [PairMeasure(PRIMARY, TOKEN, lambda chain, number: loss_rise(chain, TEXT, 0, number)),
             PairMeasure("KL on held-out text", TOKEN, lambda chain, number: kl(chain, number, TEXT)),
             PairMeasure("KL on the new task", TOKEN, lambda chain, number: kl(chain, number, task_at(chain, number))),
             PairMeasure("rise of earlier tasks' losses", TOKEN, earlier_tasks),
             PairMeasure(LEARNING, TOKEN, learning)]
    categories: dict[str, list[str]] = {}
    for benchmark in find_benchmarks(stages):
        if not benchmark.part_of and any(benchmark.name in stage.choices for stage in stages):
            categories.setdefault(benchmark.category, []).append(benchmark.name)
    found += [PairMeasure(f"{title}, {category}", unit, options_measure(names, values_of, sign))
              for title, unit, values_of, sign in OPTION_VALUES for category, names in categories.items()]
    return {measure.name: measure for measure in found}


@dataclass(frozen=True)
class Contrast:
    """Two models that are compared: values of `one` less those of `two`.

    equal_loss: the control at equal held-out loss. In each pair, whichever of the two was trained on until its held-out
    loss was that of the other, <model>-level, stands for its model. Otherwise both models had the same FLOPs.
    """
    one: str
    two: str
    equal_loss: bool = False

    def __str__(self) -> str:
        return f"{self.one} − {self.two}, equal {'loss' if self.equal_loss else 'FLOPs'}"


@dataclass(frozen=True)
class Difference:
    """The difference of two models by a measure after a stage, in each pair that has it.

    rate: the learning rate of both; None if learning was matched. of_pairs: {pair: values of the items}.
    """
    contrast: Contrast
    measure: PairMeasure
    number: int
    rate: str | None
    of_pairs: Mapping[int, ItemValues]

    @functools.cached_property
    def estimate(self) -> PairedDifference:
        """The mean over the pairs. Smaller differences than 1e-12 are rounding errors."""
        return PairedDifference(tuple(round(one.value, 12) for one in self.of_pairs.values()))

    @functools.cached_property
    def components(self) -> VarianceComponents | None:
        """The variance between the pairs and that of the items in them."""
        values = list(self.of_pairs.values())
        return variance_components(np.array([one.values for one in values]), values[0].weights)


class Study:
    """Pairs of models, each fine-tuned at one or several learning rates.

    Attributes:
        pairs: the pretraining seeds; [0] if there is a single pair.
        rates: the learning rates, ascending; [""] if there is a single one.
        models: all models, those of controls included.
        stages: the name of each stage.
        contrasts: what is compared, that of the primary measure first.
        measures: by name.
        pair: (grown, reference), the models of the first contrast.
        has_losses: whether losses were measured at all.
        choice_benchmarks: names of the benchmarks whose answers are known.
        left_out: sentences on what is not used, and why.
    """

    def __init__(self, stages: Sequence[Stage], grown: str, reference: str):
        """stages: of all pairs, models and rates, with one method. grown, reference: the models of a pair."""
        stages, self.left_out = drop_unlike_items(stages)
        self.rates = rates_of(stages)
        self._chains = {rate: make_chains([stage for stage in stages if not stage.number or (stage.rate or "") == rate])
                        for rate in self.rates}
        self._drop_other_starts()
        self.pairs = sorted({stage.pair or 0 for stage in stages})
        self.models = list(dict.fromkeys(stage.model for stage in stages))
        names = {stage.number: stage.name for stage in stages}
        self.stages = [names.get(number, f"m{number}") for number in range(max(names) + 1)]
        self.measures, self.pair = make_measures(stages), (grown, reference)
        self.has_losses = any(stage.losses for stage in stages)
        self.choice_benchmarks = [benchmark.name for benchmark in find_benchmarks(stages)
                                  if any(benchmark.name in stage.choices for stage in stages)]
        self._starts = {(stage.pair or 0, stage.model): stage for stage in stages if not stage.number}
        self.contrasts = [Contrast(grown, reference)]
        if {level(grown), level(reference)} & set(self.models):
            self.contrasts.append(Contrast(grown, reference, equal_loss=True))
        self.contrasts += [Contrast(model, reference) for model in self.models
                           if model not in self.pair and not model.endswith(LEVEL_ENDING)]

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return len(self.stages) - 1

    @property
    def matches_learning(self) -> bool:
        """Whether models are compared at equal loss on the new task, which takes several rates."""
        return len(self.rates) > 1

    def chains(self, pair: int, model: str, rate: str) -> list[Chain]:
        """The chains of a model, one for each fine-tuning seed."""
        return [chain for (number, _), chain in self._chains[rate].get(model, {}).items()
                if number == pair and chain.keys() - {0}]

    def _drop_other_starts(self) -> None:
        """Drops the divergences that were not measured from the m0 of their chain."""
        for group in (group for groups in self._chains.values() for group in groups.values()):
            for chain in group.values():
                for number, stage in chain.items():
                    chain[number], dropped = self._without_other_kl(stage, chain.get(0))
                    self.left_out += [f"{title_of(stage)}: the KL of {', '.join(dropped)} is not used, since it was "
                                      "measured from another checkpoint than m0"] if dropped else []

    @staticmethod
    def _without_other_kl(stage: Stage, start: Stage | None) -> tuple[Stage, list[str]]:
        """The stage without divergences from another checkpoint than its m0, and the names of their losses."""
        digests = {losses.digests[0] for losses in start.losses.values()} - {None} if start else set()
        dropped = [name for name, losses in stage.losses.items() if losses.kl is not None and digests
                   and losses.digests[1] is not None and losses.digests[1] not in digests]
        return replace(stage, losses={name: replace(losses, kl=None) if name in dropped else losses
                                      for name, losses in stage.losses.items()}), dropped

    @functools.cache  # noqa: B019 - a study lives as long as the report
    def values(self, name: str, pair: int, model: str, rate: str, number: int) -> ItemValues | None:
        """A measure of a model after a stage, the mean over its seeds. None if a seed lacks it."""
        found = [self.measures[name].extract(chain, number) for chain in self.chains(pair, model, rate)]
        known = [one for one in found if one is not None]
        return weighted_sum([(1 / len(known), one) for one in known]) if known and len(known) == len(found) else None

    def curve(self, name: str, pair: int, model: str, number: int) -> tuple[np.ndarray, list[ItemValues], list[str]]:
        """(loss on the new task [R], the measure at each rate, the rates), of the rates that have both."""
        points = [(x.value, y, rate) for rate in self.rates
                  if (x := self.values(LEARNING, pair, model, rate, number))
                  and (y := self.values(name, pair, model, rate, number))]
        return np.array([x for x, _, _ in points]), [y for _, y, _ in points], [rate for _, _, rate in points]

    def models_of(self, contrast: Contrast, pair: int) -> tuple[str, str] | None:
        """The two models that stand for a contrast in a pair. None if it has no control at equal loss."""
        names = contrast.one, contrast.two
        if not contrast.equal_loss:
            return names
        one, two = (level(name) if (pair, level(name)) in self._starts else name for name in names)
        return None if (one, two) == names else (one, two)

    def match(self, contrast: Contrast, pair: int, number: int, name: str = LEARNING) -> Match | None:
        """The match of the two models of a contrast at equal loss on the new task. None without runs of both."""
        models = self.models_of(contrast, pair)
        one, two = (self.curve(name, pair, model, number)[0] for model in models or ("", ""))
        return match(one, two) if len(one) and len(two) else None

    def _difference_of(self, contrast: Contrast, pair: int, name: str, number: int,
                       rate: str | None) -> ItemValues | None:
        """The difference in one pair."""
        if (models := self.models_of(contrast, pair)) is None:
            return None
        if rate is not None:
            one, two = (self.values(name, pair, model, rate, number) for model in models)
            return weighted_sum([(1, one), (-1, two)]) if one and two else None
        found = self.match(contrast, pair, number, name)
        if found is None or found.weights is None:
            return None
        return weighted_sum([(sign * weight, y) for sign, model, weights in zip((1, -1), models, found.weights)
                             for weight, y in zip(weights, self.curve(name, pair, model, number)[1])])

    @functools.cache  # noqa: B019
    def difference(self, contrast: Contrast, name: str, number: int, rate: str | None = None) -> Difference | None:
        """A difference after a stage, at equal loss on the new task or at one rate. None if no pair has it."""
        found = {pair: one for pair in self.pairs
                 if (one := self._difference_of(contrast, pair, name, number, rate)) is not None}
        return Difference(contrast, self.measures[name], number, rate, found) if found else None

    def main_difference(self, name: str, number: int | None = None) -> Difference | None:
        """The difference of the first contrast by a measure, after the last stage unless another is given: at equal
        loss on the new task, or, if there is a single rate, at this rate."""
        return self.difference(self.contrasts[0], name, self.last if number is None else number,
                               None if self.matches_learning else self.rates[0])

    def start_loss(self, pair: int, model: str) -> ItemValues | None:
        """The held-out loss of m0."""
        start = self._starts.get((pair, model))
        losses = start.losses.get(TEXT) if start else None
        return per_token(losses.nll, losses) if losses else None

    def start_flops(self, model: str) -> float | None:
        """The mean training FLOPs of m0 over the pairs; None if one of them is unknown."""
        records = [start.run.get("lineage", {}) for (_, name), start in self._starts.items() if name == model]
        found = [record["flops"] for record in records if "flops" in record]
        return sum(found) / len(found) if found and len(found) == len(records) else None

    def start_losses(self, model: str) -> PairedDifference | None:
        """The held-out loss of m0 over the pairs."""
        found = [loss.value for pair in self.pairs if (loss := self.start_loss(pair, model))]
        return PairedDifference(tuple(found)) if found else None

    def start_difference(self, contrast: Contrast) -> dict[int, float]:
        """{pair: difference of the held-out losses of both m0}, for the pairs that have both."""
        found = {}
        for pair in self.pairs:
            one, two = (self.start_loss(pair, model) for model in self.models_of(contrast, pair) or ("", ""))
            if one and two:
                found[pair] = one.value - two.value
        return found

    def unmatched(self, contrast: Contrast, number: int) -> Iterator[str]:
        """Sentences on the pairs in which the models of a contrast reach no common loss on the new task."""
        for pair in self.pairs if self.matches_learning else ():
            found = self.match(contrast, pair, number)
            if found and found.weights is None:
                one, two = (f"{model} {low:.4f} to {high:.4f}" for model, (low, high) in zip(
                    self.models_of(contrast, pair) or (), found.ranges))
                yield (f"{pair_name(pair)} is left out of {contrast} after {self.stages[number]}: the models reach no "
                       f"common loss on the new task ({one}, {two} nats per token)")

    def all_left_out(self) -> list[str]:
        """Sentences on all that is not used, and on the pairs that could not be matched."""
        return self.left_out + [line for contrast in self.contrasts for number in range(1, self.last + 1)
                                for line in self.unmatched(contrast, number)]

    def check_measure(self, name: str) -> None:
        """Raises UserError if a measure of forgetting is unknown."""
        if name not in self.measures or name == LEARNING:
            known = ", ".join(name for name in self.measures if name != LEARNING)
            raise UserError(f"unknown measure {name!r} of forgetting, expected one of {known}")


LEVEL_ENDING = "-level"


def level(model: str) -> str:
    """The name of a model that was trained on to the held-out loss of the other model of its pair."""
    return model + LEVEL_ENDING


def pair_name(pair: int) -> str:
    """How sentences call a pair."""
    return f"pair {pair}" if pair else "the pair"


def title_of(stage: Stage) -> str:
    """How sentences call a stage."""
    return ", ".join([*([pair_name(stage.pair)] if stage.pair else []), stage.model,
                      *([f"rate {stage.rate}"] if stage.rate else []), stage.name])


def rates_of(stages: Sequence[Stage]) -> list[str]:
    """The learning rates of stages, ascending; [""] if there is a single one."""
    return sorted({stage.rate or "" for stage in stages if stage.number} or {""},
                  key=lambda rate: (float(rate or 0), rate))


def drop_unlike_items(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages without losses and answers under other conditions, or of other items, than those of the first stage
    that has them; and a sentence for each stage about what was dropped."""
    first: dict[str, ItemLosses] = {}
    answered: dict[str, tuple[Stage, Choices]] = {}
    kept, sentences = [], []
    for stage in sorted(stages, key=lambda stage: (stage.number, stage.pair or 0)):
        texts = {}
        for name, losses in stage.losses.items():
            reference = first.setdefault(name, losses)
            names = unlike(reference.conditions, losses.conditions)
            if names or not np.array_equal(reference.tokens, losses.tokens):
                texts[f"losses of {name}"] = ", ".join(
                    f"{key} {shown(losses.conditions[key])} (elsewhere {shown(reference.conditions[key])})"
                    for key in names) or "other tokens"
        for name, choices in stage.choices.items():
            other, reference_choices = answered.setdefault(name, (stage, choices))
            names = unlike(other.conditions[BENCHMARKS, name], stage.conditions[BENCHMARKS, name])
            if names or len(choices.right) != len(reference_choices.right):
                texts[f"answers to {name}"] = ", ".join(names) or "other items"
        sentences += [f"{title_of(stage)}: {what} under other conditions, not used: {text}"
                      for what, text in texts.items()]
        kept.append(replace(
            stage, losses={name: one for name, one in stage.losses.items() if f"losses of {name}" not in texts},
            choices={name: one for name, one in stage.choices.items() if f"answers to {name}" not in texts}))
    return kept, sentences
