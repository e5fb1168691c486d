"""Estimates and measures of forgetting, compared with values computed by hand."""
import numpy as np
import pytest

from analysis.estimates import (
    Estimate,
    average_performance,
    backward_transfer,
    estimate_of_items,
    fg,
    forgetting_from_best,
    mean,
    over_chains,
)


def test_fg_by_hand():
    start, later = Estimate(0.5, 0.02), [Estimate(0.4, 0.02), Estimate(0.45, 0.02)]
    found = fg(start, later)
    assert found.value == pytest.approx((0.1 / 0.5 + 0.05 / 0.5) / 2 * 100)  # 15
    # the mean after is 0.425 ± 0.01414, 0.85 of the start: 100 · √(0.01414² + (0.85 · 0.02)²) / 0.5
    assert found.error == pytest.approx(4.4226, abs=1e-4)
    assert found.interval == pytest.approx((15 - 1.96 * 4.4226, 15 + 1.96 * 4.4226), abs=1e-3)
    assert fg(start, [later[0], None]).value == pytest.approx(20)  # a stage without the benchmark
    assert fg(start, [Estimate(0.6)]).value == pytest.approx(-20)  # better than at the start
    assert np.isnan(fg(start, [Estimate(0.6)]).error)  # unknown standard error
    assert fg(Estimate(0.0, 0.1), later) is None  # nothing to forget
    assert fg(None, later) is None
    assert fg(start, [None, None]) is None


def test_fg_of_a_category_is_the_mean_of_its_benchmarks():
    one, two = Estimate(15, 4), Estimate(5, 3)
    assert mean([one, two]) == Estimate(10, 2.5)
    assert mean([one]) == one
    assert one - two == Estimate(10, 5)


def test_seeds_add_their_spread_to_the_error_of_the_items():
    assert over_chains({(0, 42): Estimate(3, 1)}) == Estimate(3, 1)
    found = over_chains({(0, 42): Estimate(2, 3), (0, 43): Estimate(4, 5)})  # deviation √2, t of one degree 12.706
    assert found.value == 3
    assert over_chains({(0, 42): Estimate(2, 3), (0, 43): None}) is None  # not of the same items
    assert over_chains({}) is None
    assert found.error == pytest.approx((4 ** 2 + (12.7062 / 1.96 * 2 ** 0.5 / 2 ** 0.5) ** 2) ** 0.5)


def test_the_pairs_are_the_units_and_not_the_seeds_of_their_fine_tuning():
    found = over_chains({(1, 42): Estimate(1, 5), (1, 43): Estimate(3, 5), (2, 42): Estimate(5, 1),
                        (2, 43): Estimate(7, 1), (2, 44): Estimate(9, 1)})
    assert found.value == 4.5  # of the pairs' means 2 and 7, whose standard deviation is 5 / √2
    assert found.error == pytest.approx((3 ** 2 + (12.7062 / 1.96 * 5 / 2) ** 2) ** 0.5)


def test_values_of_the_same_items_are_compared_in_pairs():
    """The error of a difference, or of any sum, equals that of the same sum taken item by item."""
    generator = np.random.default_rng(0)
    start, one, two = (generator.normal(5, 1, 200) + np.arange(200) / 50 for _ in range(3))
    a, b, other = (estimate_of_items(items, key) for items, key in
                   ((one, "test set"), (two, "test set"), (two, "another test set")))
    assert (a - b).value == pytest.approx((one - two).mean())
    assert (a - b).error == pytest.approx((one - two).std(ddof=1) / 200 ** 0.5)
    assert (a - other).error == pytest.approx(np.hypot(one.std(ddof=1), two.std(ddof=1)) / 200 ** 0.5)
    assert (a - b).error < 0.9 * (a - other).error
    assert (a - Estimate(0.0, 0.3)).error == pytest.approx(np.hypot(a.error, 0.3))
    change = [100 * (start.mean() ** -2 * (one + two).mean() / 2 * start - (one + two) / 2 / start.mean())]
    assert fg(estimate_of_items(start, "test set"), [a, b]).error == pytest.approx(np.std(change, ddof=1) / 200 ** 0.5)
    assert mean([a, a]).error == pytest.approx(a.error)
    unknown = mean([a, Estimate(0.5)])  # an unknown error makes that of a difference unknown
    assert np.isnan((unknown - b).error)
    seeds = over_chains({(0, 42): a, (0, 43): b})
    spread = 12.7062 / 1.96 * np.std([a.value, b.value], ddof=1) / 2 ** 0.5
    assert seeds.error == pytest.approx(np.hypot(((one + two) / 2).std(ddof=1) / 200 ** 0.5, spread))
    assert (seeds - estimate_of_items(one, "test set")).error == pytest.approx(
        np.hypot(((two - one) / 2).std(ddof=1) / 200 ** 0.5, spread))


R = {(stage, task): Estimate(value) for stage, row in enumerate(
    [{"a": 10, "b": 20, "c": 5}, {"a": 50, "b": 21, "c": 6}, {"a": 45, "b": 60, "c": 7}, {"a": 40, "b": 62, "c": 30}])
    for task, value in row.items()}


def test_the_task_matrix_by_hand():
    assert average_performance(R, 3, ["a", "b", "c"]).value == pytest.approx((40 + 62 + 30) / 3)
    assert backward_transfer(R, 3, ["a", "b", "c"]).value == pytest.approx(((40 - 50) + (62 - 60)) / 2)
    assert forgetting_from_best(R, 3, ["a", "b", "c"]).value == pytest.approx(((50 - 40) + (60 - 62)) / 2)
    # a is learned again at stage 3: only b was learned before and not since
    assert average_performance(R, 3, ["a", "b", "a"]).value == pytest.approx((40 + 62) / 2)
    assert backward_transfer(R, 3, ["a", "b", "a"]).value == pytest.approx(62 - 60)
    assert forgetting_from_best(R, 3, ["a", "b", "a"]).value == pytest.approx(60 - 62)
    # a is learned again at stage 2: backward transfer counts from there
    assert backward_transfer(R, 3, ["a", "a", "c"]).value == pytest.approx(40 - 45)
    assert forgetting_from_best(R, 3, ["a", "a", "c"]).value == pytest.approx(50 - 40)
    assert backward_transfer(R, 1, ["a", "b", "c"]) is None
    gaps = {place: value for place, value in R.items() if place not in ((2, "b"), (1, "a"))}
    assert backward_transfer(gaps, 3, ["a", "b", "c"]) is None
    assert forgetting_from_best(gaps, 3, ["a", "b", "c"]).value == pytest.approx(45 - 40)
