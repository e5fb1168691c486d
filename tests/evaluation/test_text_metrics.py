"""Metrics against their libraries and against values worked out by hand."""
import sys

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from analysis.statistics import (
    Estimate,
    average_performance,
    backward_transfer,
    fg,
    forgetting_from_best,
    mean,
    of_items,
    over_seeds,
)
from common.files import UserError
from evaluation.calibration import averaged, calibration
from evaluation.text_metrics import bertscore, bleu, health, interval, rouge, sari
from tests.conftest import sample_texts

# Per size of n-gram, with counts of source and prediction taken twice since there are two references:
#   a b c → a b; a b, a c: keep 3/4, 2/3, 1, 1; delete 1/2, 1, 1, 1; add 1, 0 (of nothing added, a c is missing), 1, 1
#   a b → a x; a x, y:     keep 2/3, 1, 1, 1;   delete 1, 1, 1, 1;   add 2/3 (x is right, y is missing), 1, 1, 1
#   a a b → a a c; a d, b: keep 1/3, 0, 1, 1;   delete 1/2, 1, 1, 1; add 0, 0, 0, 1
BY_HAND = [(("a b c", "a b", ["a b", "a c"]), (41 / 48 + 7 / 8 + 3 / 4) / 3),
           (("A b", "a X", ["a x", "y"]), (11 / 12 + 1 + 11 / 12) / 3),
           (("a a b", "a a c", ["a d", "b"]), (7 / 12 + 7 / 8 + 1 / 4) / 3)]


@pytest.mark.parametrize(("texts", "expected"), BY_HAND)
def test_sari_by_hand(texts, expected):
    assert sari(*texts) == pytest.approx(100 * expected)


def test_sari_equals_the_published_example():
    references = ["About 95 species are currently known.", "About 95 species are now accepted.",
                  "95 species are now accepted."]
    value = sari("About 95 species are currently accepted.", "About 95 you now get in.", references)
    assert value == pytest.approx(26.953601953601954, abs=1e-9)  # of evaluate's metric, in its documentation


def texts():
    """Predictions that differ from their references, of which each has one to three."""
    sources = sample_texts()
    references = [sources[i:i + 1 + i % 3] for i in range(60)]
    predictions = [" ".join(source.split()[i % 4:]) for i, source in enumerate(sources[:60])]
    predictions[7] = ""
    return predictions, references


def test_bleu_equals_sacrebleu():
    predictions, references = texts()
    single = [options[:1] for options in references]
    expected = corpus_bleu(predictions, [[options[0] for options in single]]).score
    assert bleu(predictions, single)["mean"] == pytest.approx(expected, abs=1e-9)
    streams = [[options[i] if i < len(options) else None for options in references] for i in range(3)]
    found = bleu(predictions, references)
    assert found["mean"] == pytest.approx(corpus_bleu(predictions, streams).score, abs=1e-9)
    assert found["low"] < found["mean"] < found["high"]


def test_rouge_equals_rouge_score():
    predictions, references = texts()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, values in rouge(predictions, references).items():
        expected = [100 * max(scorer.score(option, prediction)[name].fmeasure for option in options)
                    for prediction, options in zip(predictions, references)]
        assert values == pytest.approx(expected)
        assert values[7] == 0 < max(values)
    assert rouge(["running dogs"], [["run dog"]])["rouge1"] == [0]  # no stemming


def test_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(5, 2, 4000)
    found, error = interval(values), values.std() / 4000 ** 0.5
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["mean"] - found["low"]) / error == pytest.approx(1.96, abs=0.15)
    assert (found["high"] - found["mean"]) / error == pytest.approx(1.96, abs=0.15)
    assert interval([3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0}


def test_health():
    assert health(["a  b", "", "see this"], ["a b", "", "see that"]) == {
        "words": [2, 0, 2], "empty": [0, 100, 0], "copied": [100, 0, 0]}


def test_calibration_by_hand():
    questions = [np.log([0.74, 0.26]), np.log([0.1, 0.13, 0.77]) - 50, np.log([0.95, 0.05])]
    found = calibration(questions, [0, 1, 0])
    # 0.74 right and 0.77 wrong are in one of the 15 bins, 0.95 right in another
    assert found["ece"] == pytest.approx((abs(1 - 0.74 - 0.77) + abs(1 - 0.95)) / 3)
    assert found["nll"] == pytest.approx(-np.log([0.74, 0.13, 0.95]).mean())
    squares = [2 * 0.26 ** 2, 0.1 ** 2 + 0.87 ** 2 + 0.77 ** 2, 2 * 0.05 ** 2]
    assert found["brier"] == pytest.approx(np.mean(squares))


def test_probabilities_are_averaged_over_draws():
    draws = [np.log([0.9, 0.1]) - 3, np.log([0.2, 0.8]) + 7]  # log-likelihoods up to a constant each
    assert averaged(draws) == pytest.approx(np.log([0.55, 0.45]))
    assert averaged(draws[:1]) == pytest.approx(np.log([0.9, 0.1]))


def test_bertscore_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(UserError, match="pip install bert-score"):
        bertscore(["a"], [["b"]], "some/encoder", 4)


# --------------------------------------------------------------------------------------------------------- forgetting

def test_fg_by_hand():
    start, later = Estimate(0.5, 0.02), [Estimate(0.4, 0.02), Estimate(0.45, 0.02)]
    found = fg(start, later)
    assert found.value == pytest.approx((0.1 / 0.5 + 0.05 / 0.5) / 2 * 100)  # 15
    # the mean after is 0.425 ± 0.01414, 0.85 of the start: 100 · √(0.01414² + (0.85 · 0.02)²) / 0.5
    assert found.error == pytest.approx(4.4226, abs=1e-4)
    assert found.interval == pytest.approx((15 - 1.96 * 4.4226, 15 + 1.96 * 4.4226), abs=1e-3)
    assert fg(start, [later[0], None]).value == pytest.approx(20)  # a stage without the benchmark
    assert fg(start, [Estimate(0.6)]).value == pytest.approx(-20)  # better than at the start
    assert np.isnan(fg(start, [Estimate(0.6)]).error)  # where a standard error is not known
    assert fg(Estimate(0.0, 0.1), later) is None  # nothing that could be forgotten
    assert fg(None, later) is None
    assert fg(start, [None, None]) is None


def test_fg_of_a_category_is_the_mean_of_its_benchmarks():
    one, two = Estimate(15, 4), Estimate(5, 3)
    assert mean([one, two]) == Estimate(10, 2.5)
    assert mean([one]) == one
    assert one - two == Estimate(10, 5)


def test_seeds_add_their_spread_to_the_error_of_the_items():
    assert over_seeds([Estimate(3, 1)]) == Estimate(3, 1)
    found = over_seeds([Estimate(2, 3), Estimate(4, 5)])  # standard deviation √2; t of one degree of freedom 12.706
    assert found.value == 3
    assert found.error == pytest.approx((4 ** 2 + (12.706 / 1.96 * 2 ** 0.5 / 2 ** 0.5) ** 2) ** 0.5)


def test_items_that_were_measured_several_times_are_compared_in_pairs():
    """The error of a difference, or of any sum, is that of the same sum taken item by item."""
    generator = np.random.default_rng(0)
    start, one, two = (generator.normal(5, 1, 200) + np.arange(200) / 50 for _ in range(3))
    a, b, other = of_items(one, "test set"), of_items(two, "test set"), of_items(two, "another test set")
    assert (a - b).value == pytest.approx((one - two).mean())
    assert (a - b).error == pytest.approx((one - two).std(ddof=1) / 200 ** 0.5)
    assert (a - other).error == pytest.approx(np.hypot(one.std(ddof=1), two.std(ddof=1)) / 200 ** 0.5)
    assert (a - b).error < 0.9 * (a - other).error
    assert (a - Estimate(0.0, 0.3)).error == pytest.approx(np.hypot(a.error, 0.3))
    change = [100 * (start.mean() ** -2 * (one + two).mean() / 2 * start - (one + two) / 2 / start.mean())]
    assert fg(of_items(start, "test set"), [a, b]).error == pytest.approx(np.std(change, ddof=1) / 200 ** 0.5)
    assert mean([a, a]).error == pytest.approx(a.error)
    unknown = mean([a, Estimate(0.5)])  # without a standard error there is none of a difference either
    assert np.isnan((unknown - b).error)
    seeds = over_seeds([a, b])
    spread = 12.706 / 1.96 * np.std([a.value, b.value], ddof=1) / 2 ** 0.5
    assert seeds.error == pytest.approx(np.hypot(((one + two) / 2).std(ddof=1) / 200 ** 0.5, spread))
    assert (seeds - of_items(one, "test set")).error == pytest.approx(
        np.hypot(((two - one) / 2).std(ddof=1) / 200 ** 0.5, spread))


R = {(stage, task): Estimate(value) for stage, row in enumerate(
    [{"a": 10, "b": 20, "c": 5}, {"a": 50, "b": 21, "c": 6}, {"a": 45, "b": 60, "c": 7}, {"a": 40, "b": 62, "c": 30}])
    for task, value in row.items()}


def test_the_task_matrix_by_hand():
    assert average_performance(R, 3, ["a", "b", "c"]).value == pytest.approx((40 + 62 + 30) / 3)
    assert backward_transfer(R, 3, ["a", "b", "c"]).value == pytest.approx(((40 - 50) + (62 - 60)) / 2)
    assert forgetting_from_best(R, 3, ["a", "b", "c"]).value == pytest.approx(((50 - 40) + (60 - 62)) / 2)
    # a comes again at stage 3: only b was learned before and not since
    assert average_performance(R, 3, ["a", "b", "a"]).value == pytest.approx((40 + 62) / 2)
    assert backward_transfer(R, 3, ["a", "b", "a"]).value == pytest.approx(62 - 60)
    assert forgetting_from_best(R, 3, ["a", "b", "a"]).value == pytest.approx(60 - 62)
    # a again at stage 2: it counts from there
    assert backward_transfer(R, 3, ["a", "a", "c"]).value == pytest.approx(40 - 45)
    assert forgetting_from_best(R, 3, ["a", "a", "c"]).value == pytest.approx(50 - 40)
    assert backward_transfer(R, 1, ["a", "b", "c"]) is None
    gaps = {place: value for place, value in R.items() if place not in ((2, "b"), (1, "a"))}
    assert backward_transfer(gaps, 3, ["a", "b", "c"]) is None
    assert forgetting_from_best(gaps, 3, ["a", "b", "c"]).value == pytest.approx(45 - 40)
