"""Measures of forgetting and of learning: the change of one model since its own m0, item by item.

The values of items are kept, so that the difference of two models is paired by item.
"""
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.benchmark_catalog import find_benchmarks
from analysis.comparison import Chain
from analysis.stages import TEXT, Choices, ItemLosses, Stage
from common.files import UserError, read_json
from common.writing import write_json

LEARNING = "new-task loss"  # the measure of learning, at which models are matched
DECREASE = "decrease of new-task loss"  # since m0: the other meaning of equal learning
PRIMARY = "rise of held-out loss"  # the default primary measure
PRIMARY_FILE = "primary.json"  # the primary measure, named before the first run; also next to a table of stages
OF_TEXT = (PRIMARY, "KL on held-out text")  # the measures of held-out text
EARLIER = "rise of earlier tasks' losses"

TOKEN, NATS, BYTE, SHARE = "nats/token", "nats", "bits/byte", "share of items"  # units


@dataclass(frozen=True)
class ItemValues:
    """Values of items [N] whose mean is a measure's value, and residuals [N]: each value minus the mean of its set,
    times the weight of the item. The spread of the residuals tells how well the items measure the value."""
    values: np.ndarray
    residuals: np.ndarray

    @property
    def value(self) -> float:
        """The measure's value."""
        return float(self.values.mean())

    @property
    def total(self) -> "ItemValues":
        """The value without its items [1]."""
        return ItemValues(np.array([self.value]), np.zeros(1))


def item_values(values: np.ndarray, weights: np.ndarray | float = 1.0) -> ItemValues:
    """Values of the items of one set. weights [N]: how much each item counts, such as its tokens, with the mean 1."""
    return ItemValues(values, values - values.mean() * weights)


def weighted_sum(terms: Sequence[tuple[float, ItemValues]]) -> ItemValues:
    """A weighted sum of values of the same items. Without items, if those of a term are not known."""
    if len({len(items.values) for _, items in terms}) > 1:
        terms = [(weight, items.total) for weight, items in terms]
    return ItemValues(np.sum([weight * items.values for weight, items in terms], axis=0),
                      np.sum([weight * items.residuals for weight, items in terms], axis=0))


def pool(sets: Sequence[ItemValues]) -> ItemValues | None:
    """The mean over sets of items, each of which counts the same. Without items, if those of a set are not known. None
    without a set."""
    if not sets:
        return None
    if any(len(items.values) == 1 for items in sets):
        return weighted_sum([(1 / len(sets), items.total) for items in sets])
    total = sum(len(items.values) for items in sets)
    scales = [total / len(sets) / len(items.values) for items in sets]
    return ItemValues(np.concatenate([scale * items.values for scale, items in zip(scales, sets)]),
                      np.concatenate([scale * items.residuals for scale, items in zip(scales, sets)]))


Extract = Callable[[Chain, int], ItemValues | None]  # a measure of a chain after a stage; None if it was not measured


@dataclass(frozen=True)
class PairMeasure:
    """A measure of a chain of stages after one of them. Higher values of all but LEARNING are more forgetting."""
    name: str
    unit: str
    extract: Extract


def per_token(sums: np.ndarray, losses: ItemLosses) -> ItemValues:
    """Sums over the tokens of items as values per token, with the items' tokens as weights."""
    return item_values(sums / losses.tokens.mean(), losses.tokens / losses.tokens.mean())


def losses_at(chain: Chain, number: int, name: str) -> ItemLosses | None:
    """The losses of held-out text or of a task after a stage."""
    return chain[number].losses.get(name) if number in chain else None


def loss_rise(chain: Chain, name: str, before: int, after: int) -> ItemValues | None:
    """The rise of a loss from one stage to another."""
    start, end = losses_at(chain, before, name), losses_at(chain, after, name)
    if start and end and len(start.nll) != len(end.nll):
        start, end = start.total, end.total
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


def change_of_learning(chain: Chain, number: int) -> ItemValues | None:
    """The loss on the new task, after it was learned, minus that of m0: the negative of its decrease."""
    return loss_rise(chain, task_at(chain, number), 0, number)


MATCHED_ON = {LEARNING: learning, DECREASE: change_of_learning}  # both fall as more is learned


def rise_of_earlier_tasks(chain: Chain, number: int) -> ItemValues | None:
    """The mean rise of the losses of earlier tasks since each was learned, as in backward transfer (Lopez-Paz and
    Ranzato, arXiv 1706.08840, eq. 3). None if one of them is missing."""
    learned = {task_at(chain, stage): stage for stage in range(1, number)}
    rises = [loss_rise(chain, task, stage, number) for task, stage in learned.items() if task != task_at(chain, number)]
    known = [rise for rise in rises if rise]
    return pool(known) if len(known) == len(rises) else None


def options_measure(names: Sequence[str], values_of: Callable[[Choices], np.ndarray | None], sign: int) -> Extract:
    """The mean change over benchmarks since m0 of a value of the right options, times `sign`."""
    def extract(chain: Chain, number: int) -> ItemValues | None:
        changes = []
        for name in names:
            ends = [chain[stage].choices.get(name) if stage in chain else None for stage in (0, number)]
            start, end = (values_of(choices) if choices else None for choices in ends)
            if start is None or end is None:
                return None
            changes.append(item_values(sign * (end - start)))
        return pool(changes)
    return extract


OPTION_VALUES: list[tuple[str, str, Callable[[Choices], np.ndarray | None], int]] = [
    ("rise of right options' NLL", NATS, lambda choices: choices.nll, 1),
    ("rise of right options' bits per byte", BYTE, lambda choices: choices.bits_per_byte, 1),
    ("loss of accuracy", SHARE, lambda choices: choices.right, -1)]


def measure_names(categories: Sequence[str]) -> list[str]:
    """The names of all measures of forgetting that a report may have, with benchmarks of these categories."""
    return [*(name for name in make_measures([]) if name != LEARNING),
            *(f"{title}, {category}" for title, *_ in OPTION_VALUES for category in categories)]


def make_measures(stages: Sequence[Stage]) -> dict[str, PairMeasure]:
    """All measures by name: of losses, then of the multiple-choice benchmarks of each category."""
    measures = [
        PairMeasure(PRIMARY, TOKEN, lambda chain, number: loss_rise(chain, TEXT, 0, number)),
        PairMeasure(OF_TEXT[1], TOKEN, lambda chain, number: kl(chain, number, TEXT)),
        PairMeasure("KL on the new task", TOKEN, lambda chain, number: kl(chain, number, task_at(chain, number))),
        PairMeasure(EARLIER, TOKEN, rise_of_earlier_tasks),
        PairMeasure(LEARNING, TOKEN, learning)]
    categories: dict[str, list[str]] = {}
    for benchmark in find_benchmarks(stages):
        if not benchmark.part_of and any(benchmark.name in stage.choices for stage in stages):
            categories.setdefault(benchmark.category, []).append(benchmark.name)
    measures += [PairMeasure(f"{title}, {category}", unit, options_measure(names, values_of, sign))
                 for title, unit, values_of, sign in OPTION_VALUES for category, names in categories.items()]
    return {measure.name: measure for measure in measures}


def check_measure(name: str, measures: Collection[str]) -> None:
    """Raises UserError if a measure of forgetting is not one of some measures."""
    if name not in measures or name == LEARNING:
        known = ", ".join(name for name in measures if name != LEARNING)
        raise UserError(f"unknown measure {name!r} of forgetting, expected one of {known}")


def primary_file(runs: str | Path) -> Path:
    """The file of an experiment that holds its primary measure."""
    return Path(runs) / "experiment" / PRIMARY_FILE


def write_primary(path: str | Path, measure: str) -> None:
    """Records the primary measure in a file."""
    write_json(path, {"primary": measure})


def read_primary(path: Path) -> str | None:
    """The primary measure in a file; None if it does not exist. Raises UserError if it is damaged."""
    if not path.exists():
        return None
    if not isinstance(measure := read_json(path, dict).get("primary"), str):
        raise UserError(f"{path} is damaged: it names no primary measure. Restore or remove it")
    return measure
