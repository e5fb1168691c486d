"""Contrasts: two models and their difference in each pair."""
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.inference import PairedDifference, VarianceComponents, variance_components
from analysis.matching import EVERYWHERE, match
from analysis.measures import MATCHED_ON, ItemValues, PairMeasure, weighted_sum


@dataclass(frozen=True)
class Contrast:
    """Two models that are compared: values of `one` minus those of `two`.

    equal_loss: the control at equal held-out loss. In each pair, whichever of the two was trained further until its
    held-out loss was that of the other, <model>-level, stands for its model. of: the model whose methods are compared,
    if methods stand for models.
    """
    one: str
    two: str
    equal_loss: bool = False
    of: str = ""

    def __str__(self) -> str:
        what = f"{self.one} − {self.two}"
        if self.of:
            return f"{what} of {self.of}"
        return f"{what}, m0 of nearly equal loss" if self.equal_loss else what


@dataclass(frozen=True)
class Difference:
    """The difference of two models by a measure after a stage, in each pair that has it.

    setting: the matching condition: one of MATCHED_ON, or the learning rate. learning: the same as text. by_pair:
    {pair: values of the items}.
    """
    contrast: Contrast
    measure: PairMeasure
    number: int
    setting: str
    learning: str
    by_pair: Mapping[int, ItemValues]

    @property
    def is_matched(self) -> bool:
        """Whether learning was matched."""
        return self.setting in MATCHED_ON

    @functools.cached_property
    def estimate(self) -> PairedDifference:
        """The mean over the pairs. Smaller differences than 1e-12 are rounding errors."""
        return PairedDifference(tuple(round(one.value, 12) for one in self.by_pair.values()))

    @functools.cached_property
    def components(self) -> VarianceComponents | None:
        """The variance between the pairs and that of the items in them. None if the items of a pair are not known."""
        pairs = self.by_pair.values()
        if len({len(items.residuals) for items in pairs}) > 1:
            return None
        return variance_components(np.array([items.value for items in pairs]),
                                   np.array([items.residuals for items in pairs]))


RateCurve = tuple[np.ndarray, list[ItemValues], list[str]]  # one of MATCHED_ON [R], a measure, the learning rates


def matched_difference(one: RateCurve, two: RateCurve, within: tuple[float, float] = EVERYWHERE) -> ItemValues | None:
    """The mean difference of two curves over the learning that both reach, within bounds. None without any."""
    found = match(one[0], two[0], within) if len(one[0]) and len(two[0]) else None
    return weighted_sum([(sign * weight, value) for sign, (_, y, _), weights in zip((1, -1), (one, two), found.weights)
                         for weight, value in zip(weights, y)]) if found and found.weights else None
