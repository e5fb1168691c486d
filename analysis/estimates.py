"""Estimates with standard errors, and the measures of forgetting: pure functions."""
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.inference import t_quantile

NORMAL = 1.96

Parts = dict[Hashable, np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error, which is NaN if it is unknown.

    parts: {item set: contribution of each item to the deviation [N]}, for a mean (x - mean) / N; empty if the items are
    unknown. Estimates combined from values of the same items, such as the difference of two models, have the error of
    a paired comparison.
    """
    value: float
    error: float = math.nan
    parts: Parts = field(default_factory=dict, compare=False, repr=False)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval (low, high)."""
        return self.value - NORMAL * self.error, self.value + NORMAL * self.error

    @property
    def excludes_zero(self) -> bool:
        """Whether the value differs from 0 by more than noise. False if the error is unknown."""
        low, high = self.interval
        return low > 0 or high < 0

    @property
    def rest(self) -> float:
        """The standard error without that of the parts."""
        if not self.parts or math.isnan(self.error):
            return self.error
        return math.sqrt(max(0.0, self.error ** 2 - parts_error(self.parts) ** 2))

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference of two estimates. They are independent except for items that both were measured on."""
        return combine(self.value - other.value, [(1, self), (-1, other)])


Matrix = dict[tuple[int, str], Estimate]  # R[stage, task]: a task's metric after a stage


def estimate_of_items(items: Iterable[float], key: Hashable) -> Estimate:
    """The mean of N items. `key` identifies the set of items."""
    values = np.asarray(items, dtype=np.float64)
    parts = {key: (values - values.mean()) / len(values)}
    return Estimate(float(values.mean()), parts_error(parts), parts)


def parts_error(parts: Parts) -> float:
    """The standard error due to the choice of items. Different sets of items are independent."""
    return math.sqrt(sum(len(part) / max(1, len(part) - 1) * float(part @ part) for part in parts.values()))


def combine(value: float, weighted: Sequence[tuple[float, Estimate]]) -> Estimate:
    """An estimate that, to first order, is a weighted sum of others, given as pairs (weight, Estimate)."""
    parts: Parts = {}
    for weight, estimate in weighted:
        for key, part in estimate.parts.items():
            parts[key] = parts.get(key, 0.0) + weight * part
    return Estimate(value, math.hypot(parts_error(parts), *(weight * estimate.rest for weight, estimate in weighted)),
                    parts)


def mean(estimates: Iterable[Estimate | None]) -> Estimate | None:
    """The mean of the estimates that are not None. None, as in all measures below, if there are none."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return None
    return combine(statistics.fmean(e.value for e in known), [(1 / len(known), e) for e in known])


def over_chains(estimates: Mapping[tuple[int, int], Estimate | None]) -> Estimate | None:
    """The mean of estimates {(pair, seed): Estimate} measured on the same items. None if one is None.

    The error due to the choice of items is the same for all. The spread of the pairs adds its standard error, widened
    by Student's t; what the choice of items adds to this spread is counted twice, so that intervals cover at least 95%.
    All seeds of a pair start from the same models, so their estimates are averaged first. In a single pair the spread
    is that of its seeds.
    """
    known = {key: estimate for key, estimate in estimates.items() if estimate is not None}
    if not known or len(known) < len(estimates):
        return None
    several_pairs = len({pair for pair, _ in known}) > 1
    units: dict[int, list[Estimate]] = {}
    for (pair, seed), estimate in known.items():
        units.setdefault(pair if several_pairs else seed, []).append(estimate)
    values, count = [statistics.fmean(e.value for e in unit) for unit in units.values()], len(units)
    average = combine(statistics.fmean(values), [(1 / len(unit) / count, e) for unit in units.values() for e in unit])
    if count == 1:
        return average
    item_error = math.hypot(parts_error(average.parts),
                            statistics.fmean(statistics.fmean(e.rest for e in unit) for unit in units.values()))
    seed_error = t_quantile(count - 1) / NORMAL * statistics.stdev(values) / count ** 0.5
    return Estimate(average.value, math.hypot(item_error, seed_error), average.parts)


def fg(start: Estimate | None, later: Iterable[Estimate | None]) -> Estimate | None:
    """FG of one benchmark: the mean over the stages m after the start o of (R_o - R_m) / R_o x 100 (Luo et al., arXiv
    2308.08747, section 3.4). Positive is forgetting. The error is to first order.

    start: R_o. later: R_m of each stage. Returns None without a start other than zero, or without a later stage; and
    with a start so small that FG is not finite.
    """
    after = mean(later)
    if start is None or not start.value or after is None:
        return None
    ratio, percent = after.value / start.value, 100 / start.value
    found = combine(100 * (1 - ratio), [(-percent, after), (ratio * percent, start)])
    return None if math.isinf(found.value) or math.isinf(found.error) else found


def average_performance(matrix: Matrix, stage: int, tasks: Sequence[str]) -> Estimate | None:
    """The mean over tasks of R[stage, task] (Lopez-Paz and Ranzato, arXiv 1706.08840, eq. 2).

    tasks: the tasks of stages 1, 2, …, as in the measures below.
    """
    return mean(matrix.get((stage, task)) for task in dict.fromkeys(tasks[:stage]))


def backward_transfer(matrix: Matrix, stage: int, tasks: Sequence[str]) -> Estimate | None:
    """The mean over the tasks learned before `stage` of R[stage, task] - R[learned, task] (Lopez-Paz and Ranzato,
    eq. 3). Negative is forgetting.

    A repeated task counts from its last stage before `stage`. The task of `stage` itself does not count.
    """
    learned = {task: number for number, task in enumerate(tasks[:stage], 1)}
    return mean(matrix[stage, task] - matrix[number, task] for task, number in learned.items()
                if number < stage and {(stage, task), (number, task)} <= matrix.keys())


def forgetting_from_best(matrix: Matrix, stage: int, tasks: Sequence[str]) -> Estimate | None:
    """The mean over the tasks learned before `stage` of their best R at an earlier stage, from the stage that first
    learned them on, minus R[stage, task] (Chaudhry et al., arXiv 1801.10112, eq. 3). Positive is forgetting."""
    gaps = []
    for task in dict.fromkeys(tasks[:stage - 1]):
        earlier = [matrix[number, task] for number in range(tasks.index(task) + 1, stage) if (number, task) in matrix]
        if task != tasks[stage - 1] and earlier and (stage, task) in matrix:
            gaps.append(max(earlier, key=lambda estimate: estimate.value) - matrix[stage, task])
    return mean(gaps)


TASK_MEASURES = {"average performance": average_performance, "backward transfer": backward_transfer,
                 "forgetting from the best stage": forgetting_from_best}
