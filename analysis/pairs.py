"""Pairs of models: does a grown model forget less than one from scratch, with a pair (a pretraining seed) as the unit?

Learning is matched: models are compared at equal loss on the new task, see matching.py. As a check they are also
compared at an equal decrease of this loss since m0, since the m0 of two models differ on the task.
"""
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from analysis.benchmark_catalog import find_benchmarks
from analysis.comparison import (
    Chain,
    drop_unlike_items,
    lacking_losses,
    make_chains,
    pair_name,
    stage_names,
    title_of,
    trained_otherwise,
)
from analysis.contrasts import Contrast, Difference, RateCurve, matched_difference
from analysis.loss_curves import Curve, curve_of_log
from analysis.matching import Match, match
from analysis.measures import (
    DECREASE,
    LEARNING,
    MATCHED_ON,
    PRIMARY,
    ItemValues,
    make_measures,
    per_token,
    task_at,
    weighted_sum,
)
from analysis.stages import TEXT, Stage, rates_of


class Study:
    """Pairs of models, each fine-tuned at one or several learning rates.

    Attributes:
        pairs: the pretraining seeds; [0] if no stage lies in a folder pair-<n>.
        rates: the learning rates, ascending; [""] if no stage lies in a folder rate-<x>.
        models: all models, those of controls included.
        stages: the name of each stage.
        contrasts: the comparisons of two models, that of the primary measure first.
        measures: by name.
        compared: (grown, reference), the models of the first contrast.
        of: the model whose methods stand for the models; "" if models are compared.
        has_losses: whether losses were measured at all.
        choice_benchmarks: names of the benchmarks whose answers are known by item.
        left_out: sentences on what is not used, and why.
        trained_otherwise: sentences on the stages that were not trained as the others.
        named: the primary measure that was named before the first run; None if that is not known.
        starts: {(pair, model): m0}.
        unit: "pair" of models, or "seed" of fine-tuning if seeds stand for pairs.
    """

    def __init__(self, stages: Sequence[Stage], grown: str, reference: str, of: str = "", named: str | None = None,
                 unit: str = "pair"):
        """stages: of all pairs, models and rates, with one method. Raises UserError if their chains are not of the same
        tasks in the same order."""
        self.named, self.unit, self.of, self.compared = named, unit, of, (grown, reference)
        self.rates = rates_of(stages)
        # with several rates, lacking_results names the stages without a loss on their own task
        self.left_out = lacking_losses([stage for stage in stages if not self.matches_learning or not stage.number
                                        or stage.task in stage.losses], unit)
        stages, dropped = drop_unlike_items(stages, unit)
        self.left_out += dropped
        self.left_out += [f"{title_of(stage, unit)}: not used, since it is not in the folder of a learning rate"
                          for stage in stages if stage.number and (stage.rate or "") not in self.rates]
        self._chains = {rate: make_chains([stage for stage in stages if not stage.number or (stage.rate or "") == rate])
                        for rate in self.rates}
        self.trained_otherwise = trained_otherwise(stages, bool(of), unit)
        self.pairs = sorted({stage.pair or 0 for stage in stages})
        self._drop_other_seeds()
        self._drop_other_starts()
        self.models = list(dict.fromkeys(stage.model for stage in stages))
        self.stages = stage_names(stages)
        self.measures = make_measures(stages)
        self.has_losses = any(stage.losses for stage in stages)
        self.choice_benchmarks = [benchmark.name for benchmark in find_benchmarks(stages)
                                  if any(benchmark.name in stage.choices and stage.choices[benchmark.name].has_items
                                         for stage in stages)]
        self.starts = {(stage.pair or 0, stage.model): stage for stage in stages if not stage.number}
        self.contrasts = [Contrast(grown, reference, of=of)]
        if {level(grown), level(reference)} & set(self.models):
            self.contrasts.append(Contrast(grown, reference, equal_loss=True))
        self.contrasts += [Contrast(model, reference, of=of) for model in self.models
                           if model not in self.compared and not model.endswith(LEVEL_ENDING)]

    @property
    def reference(self) -> str:
        """The model, or the method, that all others are compared with."""
        return self.compared[1]

    @property
    def last_task(self) -> str:
        """The task of the last stage; "" if it is unknown."""
        return next((task for groups in self._chains.values() for group in groups.values() for chain in group.values()
                     if (task := task_at(chain, self.last))), "")

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return len(self.stages) - 1

    @property
    def matches_learning(self) -> bool:
        """Whether models are compared at equal loss on the new task, which takes several rates."""
        return len(self.rates) > 1

    def is_primary(self, measure: str) -> bool:
        """Whether a measure may be called primary: it was named before the first run, or it is the default one and none
        is known to have been named."""
        return measure == (self.named or PRIMARY)

    def chains(self, pair: int, model: str, rate: str) -> list[Chain]:
        """The chains of a model, one for each fine-tuning seed."""
        return [chain for (number, _), chain in self._chains[rate].get(model, {}).items()
                if number == pair and chain.keys() - {0}]

    def name_of(self, pair: int) -> str:
        """The display name of a pair."""
        return pair_name(pair, self.unit)

    def _drop_other_seeds(self) -> None:
        """Drops the fine-tuning seeds that the compared models of a pair do not have at all their rates, and the other
        models that lack one of the remaining seeds: means over different seeds would not be alike."""
        compared = self.compared[1:] if self.of else self.compared  # methods are compared with the baseline one by one
        for pair in self.pairs:
            seeds = {(model, rate): own for rate, groups in self._chains.items() for model, group in groups.items()
                     if (own := {seed for (number, seed), chain in group.items()
                                 if number == pair and chain.keys() - {0}})}
            of_compared = {place: own for place, own in seeds.items() if place[0] in compared} or seeds
            shared = set.intersection(*of_compared.values()) if seeds else set()
            for seed in sorted(set().union(*seeds.values()) - shared):
                lacking = next(place for place, own in of_compared.items() if seed not in own)
                self._drop_seeds(pair, [seed], seeds,
                                 f"fine-tuning seed {seed} is not used, since {place_text(*lacking)} lacks it")
            for place, own in seeds.items():
                if lost := sorted(shared - own):
                    lacking_seeds = f"fine-tuning seed{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
                    self._drop_seeds(pair, own, [place],
                                     f"{place_text(*place)} is not used, since it lacks the {lacking_seeds}")

    def _drop_seeds(self, pair: int, seeds: Iterable[int], places: Iterable[tuple[str, str]], reason: str) -> None:
        """Drops the chains of fine-tuning seeds, of a model at a learning rate each, and notes the reason."""
        self.left_out.append(f"{self.name_of(pair)}: {reason}")
        for model, rate in places:
            for seed in seeds:
                self._chains[rate][model].pop((pair, seed), None)

    def _drop_other_starts(self) -> None:
        """Drops the divergences that were not measured from the m0 of their chain."""
        for group in (group for groups in self._chains.values() for group in groups.values()):
            for chain in group.values():
                for number, stage in chain.items():
                    chain[number], dropped = self._without_other_kl(stage, chain.get(0))
                    self.left_out += [f"{title_of(stage, self.unit)}: the KL of {', '.join(dropped)} is not used, "
                                      "since it was measured from another checkpoint than m0"] if dropped else []

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
        """A measure, or one of MATCHED_ON, after a stage: the mean over the seeds. None if a seed lacks it."""
        extract = MATCHED_ON[name] if name in MATCHED_ON else self.measures[name].extract
        of_seeds = [extract(chain, number) for chain in self.chains(pair, model, rate)]
        known = [values for values in of_seeds if values is not None]
        if not known or len(known) < len(of_seeds):
            return None
        return weighted_sum([(1 / len(known), values) for values in known])

    def curve(self, name: str, pair: int, model: str, number: int, learning: str = LEARNING) -> RateCurve:
        """(one of MATCHED_ON [R], the measure at each rate, the rates), of the rates that have both."""
        points = [(x.value, y, rate) for rate in self.rates
                  if (x := self.values(learning, pair, model, rate, number))
                  and (y := self.values(name, pair, model, rate, number))]
        return np.array([x for x, _, _ in points]), [y for _, y, _ in points], [rate for _, _, rate in points]

    def models_of(self, contrast: Contrast, pair: int) -> tuple[str, str] | None:
        """The two models that stand for a contrast in a pair. None if it has no control at equal loss."""
        names = contrast.one, contrast.two
        if not contrast.equal_loss:
            return names
        one, two = (level(name) if (pair, level(name)) in self.starts else name for name in names)
        is_level = abs(self.start_gap(pair, one, two)) <= LEVEL_TOLERANCE
        return (one, two) if (one, two) != names and is_level else None

    def start_gap(self, pair: int, one: str, two: str) -> float:
        """The difference of the held-out losses of two m0; NaN if one is unknown."""
        losses = self.start_loss(pair, one), self.start_loss(pair, two)
        return losses[0].value - losses[1].value if losses[0] and losses[1] else math.nan

    def match(self, contrast: Contrast, pair: int, number: int, name: str = LEARNING,
              learning: str = LEARNING) -> Match | None:
        """The match of the two models of a contrast at equal learning, one of MATCHED_ON. None without runs of both."""
        models = self.models_of(contrast, pair)
        one, two = (self.curve(name, pair, model, number, learning)[0] for model in models or ("", ""))
        return match(one, two) if len(one) and len(two) else None

    def _difference_of(self, contrast: Contrast, pair: int, name: str, number: int, setting: str) -> ItemValues | None:
        """The difference in one pair."""
        if (models := self.models_of(contrast, pair)) is None:
            return None
        if setting not in MATCHED_ON:
            one, two = (self.values(name, pair, model, setting, number) for model in models)
            return weighted_sum([(1, one), (-1, two)]) if one and two else None
        first, second = (self.curve(name, pair, model, number, setting) for model in models)
        return matched_difference(first, second)

    @functools.cache  # noqa: B019
    def difference(self, contrast: Contrast, name: str, number: int, setting: str = LEARNING) -> Difference | None:
        """A difference after a stage, at equal learning (one of MATCHED_ON) or at a rate. None if no pair has it."""
        by_pair = {pair: values for pair in self.pairs
                   if (values := self._difference_of(contrast, pair, name, number, setting)) is not None}
        models = {model for pair in by_pair for model in self.models_of(contrast, pair) or ()}
        return Difference(contrast, self.measures[name], number, setting, self.learning_text(setting, models),
                          by_pair) if by_pair else None

    def learning_text(self, setting: str, models: Iterable[str]) -> str:
        """The matching condition of a difference, as text: one of MATCHED_ON, or the learning rates."""
        if setting in MATCHED_ON:
            return f"equal {setting}"
        if setting:
            return f"learning rate {setting} (learning not matched)"
        rates = {stage.run.get("settings", {}).get("learning_rate") for model in models for pair in self.pairs
                 for chain in self.chains(pair, model, setting) for number, stage in chain.items() if number}
        text = "unknown learning rates" if not rates or None in rates else \
            "one learning rate" if len(rates) == 1 else f"learning rates from {min(rates):g} to {max(rates):g}"
        return f"{text} (learning not matched)"

    def main_difference(self, name: str, number: int | None = None) -> Difference | None:
        """The difference of the first contrast by a measure, after the last stage unless another is given: at equal
        loss on the new task, or, if there is a single rate, at this rate."""
        return self.difference(self.contrasts[0], name, self.last if number is None else number,
                               self.main_setting)

    @property
    def main_setting(self) -> str:
        """The matching condition of the main differences: the loss on the new task, or the only learning rate."""
        return LEARNING if self.matches_learning else self.rates[0]

    def start_loss(self, pair: int, model: str, name: str = TEXT) -> ItemValues | None:
        """The loss of m0 on held-out text or on a task."""
        start = self.starts.get((pair, model))
        losses = start.losses.get(name) if start else None
        return per_token(losses.nll, losses) if losses else None

    def pretraining_curve(self, pair: int, model: str) -> Curve:
        """The evaluations on held-out text during the pretraining of m0; empty without a log of them."""
        start = self.starts.get((pair, model))
        return curve_of_log(start.log) if start else []

    def start_flops(self, model: str, pairs: Iterable[int]) -> float | None:
        """The mean training FLOPs of m0 over the pairs that have it; None if they are unknown for one of them."""
        of_pairs = [self.starts[pair, model].flops for pair in pairs if (pair, model) in self.starts]
        known = [flops for flops in of_pairs if flops is not None]
        return float(np.mean(known)) if known and len(known) == len(of_pairs) else None

    def start_losses(self, contrast: Contrast, name: str = TEXT) -> dict[int, tuple[float, float]]:
        """{pair: the losses of both m0 on held-out text or on a task}, for the pairs that have both."""
        losses = {}
        for pair in self.pairs:
            one, two = (self.start_loss(pair, model, name) for model in self.models_of(contrast, pair) or ("", ""))
            if one and two:
                losses[pair] = one.value, two.value
        return losses


def place_text(model: str, rate: str) -> str:
    """A model at a learning rate, as text."""
    return f"{model} at the rate {rate}" if rate else model


def range_of_learning(ends: Sequence[float], learning: str) -> str:
    """The (lowest, highest) value of one of MATCHED_ON as text. It is a change of the loss for a decrease, which is
    written as a positive number."""
    low, high = sorted(-end for end in ends) if learning == DECREASE else ends
    return f"{low:.4f} to {high:.4f}"


LEVEL_ENDING = "-level"
LEVEL_TOLERANCE = 0.05  # nats per token between the held-out losses of two m0 that count as equal


def level(model: str) -> str:
    """The name of a model that was trained further to the held-out loss of the other model of its pair."""
    return model + LEVEL_ENDING
