"""Student's t, power and variance components, compared with tables, with published values and by simulation."""
import math

import numpy as np
import pytest

from analysis.inference import (
    PairedDifference,
    detectable,
    holm,
    mcnemar,
    power,
    spread_factors,
    t_probability,
    t_quantile,
    units_needed,
    variance_components,
)
from analysis.measures import item_values


@pytest.mark.parametrize(("df", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262),
                                              (15, 2.131), (30, 2.042), (120, 1.980), (100_001, 1.960)])
def test_quantiles_of_students_t(df, quantile):
    """Table 26.10 of Abramowitz and Stegun."""
    assert t_quantile(df) == pytest.approx(quantile, abs=5.1e-4)
    assert t_probability(t_quantile(df), df) == pytest.approx(0.95, abs=1e-12)


@pytest.mark.parametrize(("count", "low", "high"), [(2, 0.000982, 5.024), (3, 0.0506, 7.378), (6, 0.831, 12.833),
                                                    (16, 6.262, 27.488), (31, 16.791, 46.979)])
def test_the_interval_of_a_standard_deviation(count, low, high):
    """From the quantiles of chi-squared at 2.5% and 97.5%, table 26.8 of Abramowitz and Stegun."""
    assert spread_factors(count) == pytest.approx((((count - 1) / high) ** 0.5, ((count - 1) / low) ** 0.5), rel=1e-3)
    assert spread_factors(5001) == pytest.approx((1 - 1.96 / 100, 1 + 1.96 / 100), abs=1e-3)  # normal: 1 ± z / √2n
    found = PairedDifference(tuple(float(value) for value in range(count)))
    assert found.sd_interval == pytest.approx([factor * found.sd for factor in spread_factors(count)])


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 10])
def test_the_distribution_of_students_t_is_the_integral_of_its_density(df):
    grid = np.linspace(0, 1.7, 20001)
    factor = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    density = factor * (1 + grid ** 2 / df) ** (-(df + 1) / 2)
    assert t_probability(1.7, df) == pytest.approx(2 * np.trapezoid(density, grid), abs=1e-8)


def test_power_agrees_with_published_values():
    """power.t.test of R, one sample: n = 20 and delta = 0.5 sd give 0.5645; power 0.8 takes n = 33.37."""
    assert power(0.5 * 20 ** 0.5, 19) == pytest.approx(0.5645, abs=5e-5)
    assert power(0.0, 5) == pytest.approx(0.05, abs=1e-6)
    assert power(2.8, 1) == pytest.approx(0.1740, abs=1e-4)  # of the noncentral t in scipy 1.16
    assert units_needed(1.0, 0.5) == 34
    assert detectable(34) < 0.5 < detectable(33)
    assert detectable(1) == math.inf
    assert units_needed(10.0, 0.001) == pytest.approx(2.8016 ** 2 * 1e8, rel=1e-4)  # normal approximation


def test_a_paired_difference_by_hand():
    found = PairedDifference((1.0, 2.0, 6.0))  # mean 3, standard deviation √7, t = 3 / √(7/3) = 1.964
    assert (found.n, found.mean, found.sd) == (3, 3, pytest.approx(7 ** 0.5))
    half = 4.30265 * (7 / 3) ** 0.5
    assert found.interval == pytest.approx((3 - half, 3 + half), abs=1e-4)
    # A&S 26.7.4 for 2 degrees of freedom: P(|T| > t) = 1 - t / √(2 + t²)
    t = 3 / (7 / 3) ** 0.5
    assert found.p == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert not found.is_significant
    assert power(found.smallest_detectable / (7 / 3) ** 0.5, 2) == pytest.approx(0.8)
    assert PairedDifference((1.0, 1.1, 1.05)).is_significant


@pytest.mark.parametrize("values", [(1.0,), (2.0, 2.0, 2.0)])
def test_without_a_spread_there_is_no_test(values):
    found = PairedDifference(values)
    assert np.isnan(found.p)
    assert not found.is_significant
    assert found.units_needed(0.1) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.5, math.nan, 0.9])
    assert corrected[::2] == [1.0, 1.0]
    assert math.isnan(corrected[1])
    assert holm([]) == []


def test_mcnemar_by_hand():
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    assert mcnemar(0, 2000) == pytest.approx(0.0)


def test_variance_components_are_recovered():
    """Pairs with the standard deviation 0.5, items with 2 within a pair, and items that differ alike in all pairs."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        values = 0.5 * rng.normal(size=(16, 1)) + 3 * rng.normal(size=(1, 40)) + 2 * rng.normal(size=(16, 40))
        found.append(variance_components(values.mean(1), values - values.mean(1, keepdims=True)))
    assert np.mean([one.of_item for one in found]) == pytest.approx(4.0, rel=0.02)
    assert np.mean([one.of_pairs for one in found]) == pytest.approx(0.25, rel=0.1)
    assert np.median([one.item_share for one in found]) == pytest.approx(0.1 / 0.35, rel=0.1)
    assert found[0].deviation(math.inf) == found[0].of_pairs ** 0.5


def test_a_difference_in_proportion_to_the_tokens_is_one_of_the_pairs():
    """If each token of a pair has the same difference, long items do not add to the variance within a pair."""
    tokens = np.array([1.0, 5.0, 10.0, 24.0])
    weights = tokens / tokens.mean()
    pairs = [item_values(difference * weights, weights) for difference in (0.1, 0.3, 0.8)]
    found = variance_components(np.array([one.value for one in pairs]), np.array([one.residuals for one in pairs]))
    assert found.of_item == pytest.approx(0.0, abs=1e-12)
    assert found.of_pairs == pytest.approx(np.var([0.1, 0.3, 0.8], ddof=1))
    assert variance_components(np.ones(1), np.ones((1, 4))) is variance_components(np.ones(4), np.ones((4, 1))) is None


def simulate(pairs, effect, runs=4000, items=40):
    """Estimates of `runs` experiments: pairs with the standard deviation 0.3, items within them with 1."""
    rng = np.random.default_rng([pairs, round(1000 * effect)])
    means = effect + 0.3 * rng.normal(size=(runs, pairs)) + rng.normal(size=(runs, pairs, items)).mean(axis=-1)
    return [PairedDifference(tuple(one)) for one in means.tolist()]


@pytest.mark.parametrize("pairs", [6, 16])
def test_intervals_false_positives_and_power_by_simulation(pairs):
    """Items are nested in pairs. The interval covers the truth in 95% of the experiments, a true difference of 0 is
    found in 5%, and one of the smallest detectable size in 80%."""
    deviation = (0.3 ** 2 + 1 / 40) ** 0.5
    size = detectable(pairs) * deviation
    null, effect = simulate(pairs, 0.0), simulate(pairs, size)
    coverage = np.mean([one.interval[0] <= size <= one.interval[1] for one in effect])
    false_positives, found = (np.mean([one.p < 0.05 for one in experiments]) for experiments in (null, effect))
    print(f"{pairs} pairs: coverage {coverage:.1%}, false positives {false_positives:.1%}, power {found:.1%}")
    assert 0.93 <= coverage <= 0.97
    assert 0.04 <= false_positives <= 0.06
    assert found == pytest.approx(0.8, abs=0.03)
    assert units_needed(deviation, 1.0001 * size) == pairs
