"""Inference from few independent units, such as pairs of models: Student's t, power, variance components, exact tests.

The formulas of Student's t are those of Abramowitz and Stegun, Handbook of Mathematical Functions, section 26.7.
"""
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05  # of two-sided tests; intervals cover 1 - ALPHA
POWER = 0.8  # probability with which a design finds its smallest detectable difference
MAX_UNITS = 10_000  # units beyond which the normal distribution stands for Student's t

NORMAL_CDF = np.vectorize(statistics.NormalDist().cdf, otypes=[float])


def t_probability(t: float, df: int) -> float:
    """A(t|df), the probability that Student's t lies in [-t, t] (26.7.3 for odd, 26.7.4 for even df). t: at least 0.
    df: degrees of freedom, a whole number of at least 1."""
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    steps = np.arange(1 + odd, df - 1, 2)
    factors = np.cumprod(np.concatenate([[1.0], steps / (steps + 1) * math.cos(angle) ** 2]))
    if not odd:
        return math.sin(angle) * float(factors.sum())
    series = math.sin(angle) * math.cos(angle) * float(factors.sum()) if df > 1 else 0.0
    return 2 / math.pi * (angle + series)


@functools.cache
def t_quantile(df: int) -> float:
    """The t that |T| exceeds with probability ALPHA, such as 2.571 for 5 degrees of freedom."""
    return solve(lambda t: t_probability(t, df) - (1 - ALPHA))


def solve(function: Callable[[float], float]) -> float:
    """The zero of an increasing function on [0, infinity), by bisection."""
    low, high = 0.0, 1.0
    while function(high) < 0:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return middle


def power(noncentrality: float, df: int) -> float:
    """The probability that a two-sided t test finds a difference: P(|T| > t) of the noncentral t.

    T = (Z + noncentrality) / S with Z standard normal and df·S² chi-squared, integrated over S.
    noncentrality: the difference over its standard error.
    """
    critical, spread = t_quantile(df), 8 / math.sqrt(2 * df)
    ends = np.linspace(max(0.0, 1 - spread), 1 + spread, 401)
    scale = (ends[1:] + ends[:-1]) / 2
    log_density = (df - 1) * np.log(scale) - df * scale ** 2 / 2
    weights = np.exp(log_density - log_density.max())
    found = NORMAL_CDF(noncentrality - critical * scale) + NORMAL_CDF(-noncentrality - critical * scale)
    return float(weights @ found / weights.sum())


def chi_squared_cdf(x: float, df: int) -> float:
    """The probability that chi-squared is below x > 0 (1 - Q of 26.4.4 for odd, 26.4.5 for even df)."""
    odd = df % 2
    orders = (place + odd / 2 for place in range(df // 2))
    above = sum(math.exp(order * math.log(x / 2) - x / 2 - math.lgamma(order + 1)) for order in orders)
    return 1 - above - (math.erfc(math.sqrt(x / 2)) if odd else 0)


@functools.cache
def spread_factors(count: int) -> tuple[float, float]:
    """The 95% interval of a standard deviation, over that of a normal sample of `count` units."""
    df = count - 1
    highest = solve(lambda x: chi_squared_cdf(x, df) - (1 - ALPHA / 2))
    return math.sqrt(df / highest), math.sqrt(df / solve(lambda x: chi_squared_cdf(x, df) - ALPHA / 2))


@functools.cache
def detectable(count: int) -> float:
    """The smallest difference, in standard deviations, that a t test of `count` units finds with the power POWER."""
    return solve(lambda size: power(size * math.sqrt(count), count - 1) - POWER) if count > 1 else math.inf


def units_needed(deviation: float, effect: float) -> int:
    """The number of units that a t test needs to find the difference `effect` with the power POWER.

    deviation: the standard deviation between units. A normal approximation beyond MAX_UNITS units.
    """
    normal = statistics.NormalDist()
    quantiles = normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(POWER)
    count = max(2, math.ceil((quantiles * deviation / effect) ** 2))  # never more than Student's t needs
    while count <= MAX_UNITS and detectable(count) * deviation > effect:
        count += 1
    return count


@dataclass(frozen=True)
class PairedDifference:
    """The mean of a difference over independent units, here one value for each pair of models.

    Attributes that need a spread are NaN for a single unit.
    """
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """The number of units."""
        return len(self.values)

    @functools.cached_property
    def mean(self) -> float:
        """The mean difference."""
        return statistics.fmean(self.values)

    @functools.cached_property
    def sd(self) -> float:
        """The standard deviation between the units."""
        return statistics.stdev(self.values) if self.n > 1 else math.nan

    @property
    def half_width(self) -> float:
        """Half of the 95% interval: the standard error times the quantile of Student's t."""
        return t_quantile(self.n - 1) * self.sd / math.sqrt(self.n) if self.n > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the mean."""
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def p(self) -> float:
        """The two-sided p-value of the one-sample t test."""
        if self.n < 2 or not self.sd:
            return math.nan  # without spread, as for a metric that does not change, there is no test
        return 1 - t_probability(abs(self.mean) / self.sd * math.sqrt(self.n), self.n - 1)

    @property
    def is_significant(self) -> bool:
        """Whether the p-value is below ALPHA, so that the 95% interval excludes 0; False without a spread, which
        a test needs."""
        return self.p < ALPHA

    @property
    def sd_interval(self) -> tuple[float, float]:
        """The 95% interval of the standard deviation."""
        low, high = spread_factors(self.n) if self.n > 1 else (math.nan, math.nan)
        return low * self.sd, high * self.sd

    @property
    def smallest_detectable(self) -> float:
        """The smallest true difference that this number of units finds with 80% power, if their standard deviation is
        the true one."""
        return detectable(self.n) * self.sd if self.n > 1 else math.nan

    def units_needed(self, effect: float) -> int | None:
        """The number of units that find a true difference `effect` with 80% power. None without a spread."""
        return units_needed(self.sd, effect) if self.n > 1 and self.sd else None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979). A NaN stays and does not
    count."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[place] = highest
    return corrected


@dataclass(frozen=True)
class VarianceComponents:
    """The components of the variance between pairs: s² = of_pairs + of_item / items, both at least 0.

    of_pairs: variance of the pairs' true differences. of_item: variance of a single item within a pair.
    """
    of_pairs: float
    of_item: float
    items: int

    @property
    def item_share(self) -> float:
        """The share of the variance between pairs that is due to the choice of items within a pair."""
        total = self.of_pairs + self.of_item / self.items
        return self.of_item / self.items / total if total else math.nan

    def deviation(self, items: float) -> float:
        """The standard deviation between pairs with another number of items."""
        return math.sqrt(self.of_pairs + self.of_item / items)


def variance_components(means: np.ndarray, residuals: np.ndarray) -> VarianceComponents | None:
    """The variance components of the pairs' differences [pairs], each the mean over the items of the pair.

    residuals [pairs, items]: the values of the items without the means of the pairs. The items are the same in all
    pairs, so that an item's own mean does not add to the variance between pairs; what is left without it does, the
    residual of the two-way layout (Searle, Casella and McCulloch, Variance Components, section 4.3). None for less than
    two pairs or items.
    """
    pairs, items = residuals.shape
    if pairs < 2 or items < 2:
        return None
    residuals = residuals - residuals.mean(axis=0)
    of_item = float((residuals ** 2).sum()) / ((pairs - 1) * (items - 1))
    return VarianceComponents(max(0.0, float(means.var(ddof=1)) - of_item / items), of_item, items)


def mcnemar(one: int, other: int) -> float:
    """The two-sided p-value of McNemar's exact test: are `one` and `other` changes in two directions equally likely?"""
    total = one + other
    tail = sum(math.comb(total, count) for count in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2 ** total)
