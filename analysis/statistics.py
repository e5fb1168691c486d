"""Measures of generated texts and of predictions: pure functions.

Scores of texts are percentages, as sacrebleu prints them.
"""
import math
import statistics
from dataclasses import dataclass, field

import numpy as np

# Two-sided 95% quantiles of Student's t for 1, 2, …, 30 degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)

NORMAL = 1.96


@dataclass(frozen=True)
class Estimate:
    """A measured value with its standard error, which is nan where it is not known.

    parts: where the value comes from items that are known one by one, {items: their shares of the deviation [N]}, such
    as (x - mean) / N. So what is estimated from several values of the same items, such as the difference of two models,
    has the error of a paired comparison.
    """
    value: float
    error: float = math.nan
    parts: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def interval(self):
        """The 95% interval (low, high)."""
        return self.value - NORMAL * self.error, self.value + NORMAL * self.error

    @property
    def rest(self):
        """The standard error apart from that of the parts."""
        if not self.parts or math.isnan(self.error):
            return self.error
        return math.sqrt(max(0.0, self.error ** 2 - spread(self.parts) ** 2))

    def __sub__(self, other):
        """The difference of two estimates, independent but for the items that both were measured on."""
        return combine(self.value - other.value, [(1, self), (-1, other)])


def of_items(items, key):
    """The mean of N items, of which `key` says which they are."""
    items = np.asarray(items, dtype=np.float64)
    parts = {key: (items - items.mean()) / len(items)}
    return Estimate(float(items.mean()), spread(parts), parts)


def spread(parts):
    """The standard error that the choice of items adds: those of one key come together, keys are independent."""
    return math.sqrt(sum(len(part) / max(1, len(part) - 1) * float(part @ part) for part in parts.values()))


def combine(value, weighted):
    """An estimate that is, to first order, the sum of others with weights: pairs (weight, Estimate)."""
    parts = {}
    for weight, estimate in weighted:
        for key, part in estimate.parts.items():
            parts[key] = parts.get(key, 0.0) + weight * part
    return Estimate(value, math.hypot(spread(parts), *(weight * estimate.rest for weight, estimate in weighted)), parts)


def mean(estimates):
    """The mean of estimates."""
    return combine(statistics.fmean(e.value for e in estimates), [(1 / len(estimates), e) for e in estimates])


def over_seeds(estimates):
    """One estimate from those of several seeds, which were measured on the same items.

    What the choice of items adds to the error is the same for all seeds and does not shrink with their number; what the
    seeds add is their standard error, widened by Student's t.
    """
    values, count = [e.value for e in estimates], len(estimates)
    if count == 1:
        return estimates[0]
    parts = mean(estimates).parts
    items = math.hypot(spread(parts), statistics.fmean(e.rest for e in estimates))
    wide = (STUDENT[count - 2] if count - 2 < len(STUDENT) else NORMAL) / NORMAL
    return Estimate(statistics.fmean(values), math.hypot(items, wide * statistics.stdev(values) / count ** 0.5), parts)


def fg(start, later):
    """FG of one benchmark: the mean over the stages m after the start o of (R_o - R_m) / R_o x 100 (Luo et al., arXiv
    2308.08747, section 3.4). Positive is forgetting.

    start: Estimate of R_o, or None; later: those of the stages, None where one was not measured. None where there is
    nothing to compare: no start, a start of zero, or no later stage. The error is that to first order.
    """
    known = [estimate for estimate in later if estimate is not None]
    if start is None or not start.value or not known:
        return None
    after = mean(known)
    ratio, percent = after.value / start.value, 100 / start.value
    return combine(100 * (1 - ratio), [(-percent, after), (ratio * percent, start)])


def average_performance(matrix, stage, tasks):
    """The mean over tasks of R[stage, task] (Lopez-Paz and Ranzato, arXiv 1706.08840, eq. 2); None if none is known."""
    known = [matrix[stage, task] for task in dict.fromkeys(tasks[:stage]) if (stage, task) in matrix]
    return mean(known) if known else None


def backward_transfer(matrix, stage, tasks):
    """How later stages changed the tasks learned before: the mean over them of R[stage, task] - R[learned, task] (eq. 3
    there). Negative is forgetting.

    matrix: {(stage, task): Estimate}; tasks: what stages 1, 2, … learn. A task that comes again counts from its last
    time before `stage`; the one learned at `stage` itself does not count.
    """
    learned = {task: number for number, task in enumerate(tasks[:stage], 1)}
    found = [matrix[stage, task] - matrix[number, task] for task, number in learned.items()
             if number < stage and {(stage, task), (number, task)} <= matrix.keys()]
    return mean(found) if found else None


def forgetting_from_best(matrix, stage, tasks):
    """The mean over tasks learned before of their best value at an earlier stage since they were first learned, less
    that at `stage` (Chaudhry et al., arXiv 1801.10112, eq. 3). Positive is forgetting."""
    found = []
    for task in dict.fromkeys(tasks[:stage - 1]):
        if task == tasks[stage - 1]:
            continue
        earlier = [matrix[number, task] for number in range(tasks.index(task) + 1, stage) if (number, task) in matrix]
        if earlier and (stage, task) in matrix:
            found.append(max(earlier, key=lambda estimate: estimate.value) - matrix[stage, task])
    return mean(found) if found else None
