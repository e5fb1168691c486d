"""Comparison at equal learning: forgetting as a function of the loss on the new task, from runs at several rates.

Notation: x is the loss on the new task, y any measure of forgetting, both [R] over learning rates in ascending order.
"""
import math
from dataclasses import dataclass

import numpy as np

EVERYWHERE = -math.inf, math.inf


def efficient_branch(x: np.ndarray) -> np.ndarray:
    """The positions of the rates that lower x below that of every smaller rate, in order of x, ascending.

    The branch goes from the smallest rate to the one with the lowest x. A rate beyond it, or one that does not lower x,
    forgets without learning more.
    """
    lowest = np.minimum.accumulate(x)
    return np.flatnonzero(np.concatenate([[True], x[1:] < lowest[:-1]]))[::-1]


def mean_weights(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weights w [R] such that w @ y is the mean over [low, high] of y, interpolated linearly in x.

    x: ascending; low and high lie within its range. If they are equal, w @ y is the value at this point.
    """
    knots = np.unique(np.clip(x, low, high))
    hats = np.array([np.interp(knots, x, unit) for unit in np.eye(len(x))])  # [R, K]
    if len(knots) == 1:
        return hats[:, 0]
    return np.trapezoid(hats, knots, axis=1) / (high - low)


@dataclass(frozen=True)
class Match:
    """Two curves over learning rates, at equal loss on the new task.

    ranges: (lowest, highest) x of each efficient branch. common: (lowest, highest) x that both branches reach, within
    given bounds; the first is the higher one if there is none. weights: of the rates of each curve, [R], such that the
    difference of both weighted sums of y is the mean difference over `common`; None if there is no common x.
    """
    ranges: tuple[tuple[float, float], tuple[float, float]]
    common: tuple[float, float]
    weights: tuple[np.ndarray, np.ndarray] | None


def match(one: np.ndarray, two: np.ndarray, within: tuple[float, float] = EVERYWHERE) -> Match:
    """Matches two curves, given the x [R] of each, which may be of different rates. within: bounds of x."""
    branches = efficient_branch(one), efficient_branch(two)
    first, second = ((float(x[branch[0]]), float(x[branch[-1]])) for x, branch in zip((one, two), branches))
    lows, highs = zip(first, second, within)
    common, weights = (max(lows), min(highs)), (np.zeros(len(one)), np.zeros(len(two)))
    if common[0] > common[1]:
        return Match((first, second), common, None)
    for own, x, branch in zip(weights, (one, two), branches):
        own[branch] = mean_weights(x[branch], *common)
    return Match((first, second), common, weights)
