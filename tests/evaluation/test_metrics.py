"""Text metrics and calibration, compared with their libraries and with values computed by hand."""
import sys
import types

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from common.files import UserError
from evaluation import metrics
from tests.conftest import sample_texts

# Scores by size of n-gram. Counts of source and prediction are doubled, since there are two references:
#   a b c → a b; a b, a c: keep 3/4, 2/3, 1, 1; delete 1/2, 1, 1, 1; add 1, 0 (of nothing added, a c is missing), 1, 1
#   a b → a x; a x, y:     keep 2/3, 1, 1, 1;   delete 1, 1, 1, 1;   add 2/3 (x is right, y is missing), 1, 1, 1
#   a a b → a a c; a d, b: keep 1/3, 0, 1, 1;   delete 1/2, 1, 1, 1; add 0, 0, 0, 1
BY_HAND = [(("a b c", "a b", ["a b", "a c"]), (41 / 48 + 7 / 8 + 3 / 4) / 3),
           (("A b", "a X", ["a x", "y"]), (11 / 12 + 1 + 11 / 12) / 3),
           (("a a b", "a a c", ["a d", "b"]), (7 / 12 + 7 / 8 + 1 / 4) / 3)]


@pytest.mark.parametrize(("texts", "expected"), BY_HAND)
def test_sari_hf_by_hand(texts, expected):
    assert metrics.sari_hf(*texts) == pytest.approx(100 * expected)


def test_sari_hf_equals_the_published_example():
    references = ["About 95 species are currently known.", "About 95 species are now accepted.",
                  "95 species are now accepted."]
    value = metrics.sari_hf("About 95 species are currently accepted.", "About 95 you now get in.", references)
    assert value == pytest.approx(26.953601953601954, abs=1e-9)  # from the documentation of Hugging Face's metric


SOURCES = ["About 95 species are currently accepted.", "The cat perched imposingly on the mat.",
           "It's a small-sized town, in 1990 terms."]
SIMPLER = ["About 95 you now get in.", "The cat sat on the mat on the mat.", ""]
REFERENCES = [["About 95 species are currently known.", "About 95 species are now accepted.",
               "95 species are now accepted."],
              ["The cat sat on the mat.", "A cat sat there, on the mat.", "The cat was on the mat."],
              ["It was a small town in 1990.", "It is a small town.", "In 1990 it was a small town."]]


def test_sari_equals_easse():
    """The expected values are those of easse 0.2.4 (github.com/feralvam/easse, commit 6a4352e), which is not on PyPI:
    get_corpus_sari_operation_scores with its defaults."""
    found, contributions = metrics.sari(SOURCES, SIMPLER, REFERENCES)
    assert [found[name] for name in ("add", "keep", "delete")] == pytest.approx(
        [17.80405405405406, 66.89189189189189, 85.10034665207078], abs=1e-9)
    assert found["mean"] == pytest.approx(56.598764199338916, abs=1e-9)
    assert found["low"] < found["mean"] < found["high"]
    rest = [[[text for number, text in enumerate(texts) if number != left_out]
             for texts in (SOURCES, SIMPLER, REFERENCES)] for left_out in range(3)]
    pseudo_values = np.array([3 * found["mean"] - 2 * metrics.sari(*texts)[0]["mean"] for texts in rest])
    assert contributions == pytest.approx((pseudo_values + found["mean"] - pseudo_values.mean()).tolist())
    assert np.mean(contributions) == pytest.approx(found["mean"], abs=1e-9)  # so that a report can compare sentences


def test_sari_by_hand():
    """a b → a c; the reference a c: kept a, deleted b and a b, added c and a c; no n-grams of three or four words."""
    found, _ = metrics.sari(["A b"], ["a c"], [["a c"]])
    assert [found[name] for name in ("add", "keep", "delete")] == [50, 25, 50]
    assert metrics.sari(["a"], ["a"], [["a"]])[0]["mean"] == pytest.approx(25 / 3)  # 0/0 is 0


def texts():
    """Predictions that differ from their references; each has one to three."""
    sources = sample_texts()
    references = [sources[i:i + 1 + i % 3] for i in range(60)]
    predictions = [" ".join(source.split()[i % 4:]) for i, source in enumerate(sources[:60])]
    predictions[7] = ""
    return predictions, references


def test_bleu_equals_sacrebleu():
    predictions, references = texts()
    single = [options[:1] for options in references]
    expected = corpus_bleu(predictions, [[options[0] for options in single]]).score
    assert metrics.bleu(predictions, single)["mean"] == pytest.approx(expected, abs=1e-9)
    streams = [[options[i] if i < len(options) else None for options in references] for i in range(3)]
    found = metrics.bleu(predictions, references)
    assert found["mean"] == pytest.approx(corpus_bleu(predictions, streams).score, abs=1e-9)
    assert found["low"] < found["mean"] < found["high"]


def test_rouge_equals_rouge_score():
    predictions, references = texts()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, values in metrics.rouge(predictions, references).items():
        expected = [100 * max(scorer.score(option, prediction)[name].fmeasure for option in options)
                    for prediction, options in zip(predictions, references)]
        assert values == pytest.approx(expected)
        assert values[7] == 0 < max(values)
    assert metrics.rouge(["running dogs"], [["run dog"]])["rouge1"] == [0]  # no stemming


def test_bootstrap_interval_of_the_mean():
    values = np.random.default_rng(1).normal(5, 2, 4000)
    found, error = metrics.bootstrap_interval(values), values.std() / 4000 ** 0.5
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["mean"] - found["low"]) / error == pytest.approx(1.96, abs=0.15)
    assert (found["high"] - found["mean"]) / error == pytest.approx(1.96, abs=0.15)
    assert metrics.bootstrap_interval([3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0}


def test_sanity_metrics():
    assert metrics.sanity_metrics(["a  b", "", "see this"], ["a b", "", "see that"]) == {
        "words": [2, 0, 2], "empty": [0, 100, 0], "copied": [100, 0, 0]}


def test_calibration_by_hand():
    questions = [np.log([0.74, 0.26]), np.log([0.1, 0.13, 0.77]) - 50, np.log([0.95, 0.05])]
    found = metrics.calibration_metrics(questions, [0, 1, 0])
    # 0.74 right and 0.77 wrong are in one of the 15 bins, 0.95 right in another
    assert found["ece"] == pytest.approx((abs(1 - 0.74 - 0.77) + abs(1 - 0.95)) / 3)
    assert found["nll"] == pytest.approx(-np.log([0.74, 0.13, 0.95]).mean())
    squares = [2 * 0.26 ** 2, 0.1 ** 2 + 0.87 ** 2 + 0.77 ** 2, 2 * 0.05 ** 2]
    assert found["brier"] == pytest.approx(np.mean(squares))
    found = metrics.calibration_metrics([np.log([0.72, 0.28]), np.log([0.74, 0.26])], [0, 1])
    assert found["ece"] == pytest.approx((0.28 + 0.74) / 2)  # 11/15 lies between them


def test_probabilities_are_averaged_over_samples_of_the_weights():
    samples = [np.log([0.9, 0.1]) - 3, np.log([0.2, 0.8]) + 7]  # log-likelihoods up to a constant each
    assert metrics.average_log_probs(samples) == pytest.approx(np.log([0.55, 0.45]))
    assert metrics.average_log_probs(samples[:1]) == pytest.approx(np.log([0.9, 0.1]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_likelihoods_that_are_not_finite(value):
    with pytest.raises(UserError, match=r"log-likelihoods of options are not finite: \[-1.0, "):
        metrics.calibration_metrics([[-2.0, -3.0], [-1.0, value]], [0, 0])
    with pytest.raises(UserError, match="log-likelihoods of options are not finite"):
        metrics.average_log_probs([[-2.0, -3.0], [-1.0, value]])


def test_bertscore(monkeypatch):
    """The package is not installed here: a module takes its place."""
    package = types.ModuleType("bert_score")
    package.score = lambda *_, model_type, num_layers: (None, None, torch.tensor([0.5, num_layers / 4]))
    monkeypatch.setitem(sys.modules, "bert_score", package)
    assert metrics.bertscore(["a", "b"], [["a"], ["b"]], "some/encoder", 3) == [50, 75]
    package.score = lambda *_, **__: (None, None, torch.tensor([0.5, np.nan]))
    with pytest.raises(UserError, match="layer 3 of the encoder in some/encoder: its scores are not finite"):
        metrics.bertscore(["a", "b"], [["a"], ["b"]], "some/encoder", 3)

    def score(*_, **__):
        raise AssertionError("num_layers should be between 1 and 2")  # as bert-score does

    package.score = score
    with pytest.raises(UserError, match="layer 3 of the encoder in some/encoder: num_layers should be between 1 and 2"):
        metrics.bertscore(["a"], [["b"]], "some/encoder", 3)


def test_intervals_of_sari_and_bleu_have_the_width_of_the_jackknifes():
    sources = sample_texts()[:60]
    references = [[text] for text in sources]
    predictions = [" ".join(source.split()[i % 4:]) for i, source in enumerate(sources)]

    def half_width(values):
        return 1.96 * (59 / 60 * np.sum((np.array(values) - np.mean(values)) ** 2)) ** 0.5

    def without(texts, left_out):
        return texts[:left_out] + texts[left_out + 1:]

    found, contributions = metrics.sari([f"well {source}" for source in sources], predictions, references)
    expected = 1.96 * np.std(contributions, ddof=1) / 60 ** 0.5
    assert (found["high"] - found["low"]) / 2 == pytest.approx(expected, rel=0.15)
    found = metrics.bleu(predictions, references)
    expected = half_width([corpus_bleu(without(predictions, i), [without(sources, i)]).score for i in range(60)])
    assert (found["high"] - found["low"]) / 2 == pytest.approx(expected, rel=0.15)
