"""Differences, p-values and ranges as text."""
import math
from collections.abc import Iterable

from analysis.inference import PairedDifference

MOST_DECIMALS = 6  # of values that differ by rounding errors only


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
