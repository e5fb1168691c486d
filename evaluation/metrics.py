"""Metrics of generated texts, in percent as in sacrebleu, and calibration of answers. All are pure functions."""
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.files import UserError, first_line

RESAMPLES = 1000
ECE_BINS = 15
SARI_SIZES = 4  # n-grams of up to so many words
SARI_VERSION = "EASSE 0.2"  # whose figures `sari` gives
CALIBRATION_METRICS = ("ece", "nll", "brier")


def bootstrap_interval(values: Sequence[float]) -> dict[str, float]:
    """Returns {"mean", "low", "high"}: the mean and its 95% interval from the percentile bootstrap (Efron, 1979)."""
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.percentile(sample[picks].mean(1), (2.5, 97.5))
    return {"mean": float(sample.mean()), "low": float(low), "high": float(high)}


def bleu(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Returns {"mean", "low", "high"}: corpus BLEU and its 95% interval from sacrebleu's bootstrap over the samples.

    Uses the tokenizer 13a (Papineni et al., 2002; Post, arXiv 1804.08771). The number of references of a prediction may
    vary.
    """
    from sacrebleu.metrics import BLEU
    streams = [[texts[i] if i < len(texts) else None for texts in references]
               for i in range(max(map(len, references)))]
    score: Any = BLEU(tokenize="13a").corpus_score(predictions, streams, n_bootstrap=RESAMPLES)  # type: ignore[arg-type]
    return {"mean": score.score, "low": score._mean - score._ci, "high": score._mean + score._ci}


def rouge(predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """Returns {"rouge1", "rouge2", "rougeL"}: F1 of each prediction (Lin, 2004), by rouge-score without stemming.

    Each of the three takes the best of several references.
    """
    from rouge_score.rouge_scorer import RougeScorer
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references)]
    return {name: [100 * score[name].fmeasure for score in scores] for name in names}


@functools.cache
def tokenizer_13a() -> Callable[[str], str]:
    """Returns sacrebleu's tokenizer 13a."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    return Tokenizer13a()


def sari_words(text: str) -> list[str]:
    """The words of a text for SARI: lower-cased, split by the tokenizer 13a."""
    return tokenizer_13a()(text.lower()).split()


def sari_counts(source: str, prediction: str, references: Sequence[str]) -> np.ndarray:
    """The n-gram counts of one simplification that corpus SARI sums, [3, 4, 3].

    Axes: the operations add, keep and delete; n-grams of 1 to 4 words; the number that are right, that the prediction
    has, and that the references have. Added n-grams count once. The others count with their frequency: those of source
    and prediction times the number of references, since they are compared with the sum over the references.
    """
    texts = [sari_words(text) for text in (source, prediction, *references)]
    counts = np.zeros((3, SARI_SIZES, 3))
    for size in range(1, SARI_SIZES + 1):
        before, after, *wanted = (Counter(ngrams(words, size)) for words in texts)
        reference: Counter = sum(wanted, Counter())
        added, addable = after.keys() - before.keys(), reference.keys() - before.keys()
        before, after = (Counter({gram: len(wanted) * count for gram, count in text.items()})
                         for text in (before, after))
        kept, keepable, deleted, deletable = before & after, before & reference, before - after, before - reference
        counts[:, size - 1] = [[len(added & addable), len(added), len(addable)],
                               [(kept & keepable).total(), kept.total(), keepable.total()],
                               [(deleted & deletable).total(), deleted.total(), deletable.total()]]
    return counts


def sari_scores(counts: np.ndarray) -> np.ndarray:
    """F1 of adding, keeping and deleting, in percent: [..., 3] of summed `sari_counts` [..., 3, 4, 3].

    The mean over the four sizes of n-grams; 0/0 is 0.
    """
    right, predicted, wanted = np.moveaxis(counts, -1, 0)
    # F1 of the precision right/predicted and the recall right/wanted is 2·right / (predicted + wanted).
    return 100 * np.divide(2 * right, predicted + wanted, out=np.zeros_like(right), where=right > 0).mean(-1)


def sari(sources: Sequence[str], predictions: Sequence[str],
         references: Sequence[Sequence[str]]) -> tuple[dict[str, float], list[float]]:
    """SARI of a test set (Xu et al., 2016), as EASSE computes it and papers report it (Alva-Manchego et al., arXiv
    1908.04567): the mean of the F1 of added, kept and deleted n-grams, from counts summed over all sentences
    (the paper takes the precision of deletions, and averages precision and recall over n before the F1).

    Returns {"mean", "low", "high", "add", "keep", "delete"} in percent, with the 95% interval from the percentile
    bootstrap over the sentences; and what each sentence contributes, for comparisons sentence by sentence: its
    jackknife pseudo-value (Tukey, 1958), shifted so that their mean is SARI.
    """
    counts = np.array([sari_counts(*texts) for texts in zip(sources, predictions, references)])
    picks = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
    resampled = (picks @ counts.reshape(len(counts), -1)).reshape(RESAMPLES, *counts.shape[1:])
    low, high = np.percentile(sari_scores(resampled).mean(-1), (2.5, 97.5))
    parts, without = sari_scores(counts.sum(0)), sari_scores(counts.sum(0) - counts).mean(-1)
    contributions = len(counts) * parts.mean() - (len(counts) - 1) * without
    contributions += parts.mean() - contributions.mean()  # the jackknife's estimate of the bias, which SARI keeps
    return {"mean": float(parts.mean()), "low": float(low), "high": float(high)} | dict(
        zip(("add", "keep", "delete"), parts.tolist())), contributions.tolist()


def sari_hf(source: str, prediction: str, references: list[str]) -> float:
    """SARI of one simplification, as defined by Hugging Face's metric of that name (Xu et al., 2016, section 4).

    Its mean over a test set is up to five points from the SARI that papers report.

    The mean over n-grams of 1 to 4 words of three scores against all references: F1 of kept words, precision of
    deleted words, F1 of added words. Texts are lower-cased and split by the tokenizer 13a. 0/0 is 1. An empty text is
    one empty word, as in that metric.
    """
    words = [tokenizer_13a()(text.lower()).split(" ") for text in (source, prediction, *references)]
    scores = [ngram_sari(*(Counter(ngrams(text, size)) for text in words)) for size in range(1, 5)]
    return 100 * statistics.fmean(statistics.fmean(part) for part in zip(*scores))


def ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    """All sequences of `size` consecutive words."""
    return [tuple(words[start:start + size]) for start in range(len(words) - size + 1)]


def ngram_sari(source: Counter, prediction: Counter, *references: Counter) -> tuple[float, float, float]:
    """(keep, delete, add) scores of SARI from the counts of n-grams of one size.

    Counts of source and prediction are multiplied by the number of references, since they are compared with the sum
    of the references' counts.
    """
    reference = sum(references, Counter())
    source, prediction = (Counter({gram: len(references) * count for gram, count in text.items()})
                          for text in (source, prediction))
    kept, keepable = source & prediction, source & reference
    rightly_kept = kept & reference
    keep = f1(ratio(sum(count / kept[gram] for gram, count in rightly_kept.items()), len(kept)),
              ratio(sum(rightly_kept.values()), sum(keepable.values())))
    deleted = source - prediction
    delete = ratio(sum(count / deleted[gram] for gram, count in (deleted - reference).items()), len(deleted))
    added, addable = prediction.keys() - source.keys(), reference.keys() - source.keys()
    rightly_added = len(added & addable)
    return keep, delete, f1(ratio(rightly_added, len(added)), ratio(rightly_added, len(addable)))


def ratio(part: float, whole: float) -> float:
    """part / whole; 1 if whole is 0."""
    return part / whole if whole else 1.0


def f1(precision: float, recall: float) -> float:
    """The harmonic mean; 0 if both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def bertscore(predictions: list[str], references: list[list[str]], directory: str, layer: int | None) -> list[float]:
    """F1 of BERTScore (Zhang et al., arXiv 1904.09675) of each prediction, in percent, without baseline rescaling.

    Compares vectors of one layer of the encoder in a directory. Needs the optional package bert-score. Raises UserError
    if the encoder cannot be used, or if its scores are not finite.
    """
    try:
        from bert_score import score
        _, _, f1_scores = score(predictions, references, model_type=str(directory), num_layers=layer)
        if not f1_scores.isfinite().all():
            raise ValueError("its scores are not finite")
    except Exception as error:  # of bert-score and transformers
        raise UserError(f"BERTScore cannot be computed with layer {layer} of the encoder in {directory}: "
                        f"{first_line(error)}") from error
    return (100 * f1_scores).tolist()


def sanity_metrics(predictions: list[str], sources: list[str]) -> dict[str, list[float]]:
    """Returns {"words", "empty", "copied"} of each prediction; they tell a broken model from a low score.

    "words" is the length in words. "empty" and "copied" (equal to the source) are 0 or 100.
    """
    pairs = [(text.split(), source.split()) for text, source in zip(predictions, sources)]
    return {"words": [len(words) for words, _ in pairs], "empty": [100.0 * (not words) for words, _ in pairs],
            "copied": [100.0 * (bool(words) and words == source) for words, source in pairs]}


def calibration_metrics(log_likelihoods: Sequence, targets: Sequence[int]) -> dict[str, float]:
    """Returns {"ece", "nll", "brier"} of multiple-choice answers.

    The softmax of the log-likelihoods of a question's options gives their probabilities. `targets` are the indices of
    the right options. "ece" is the expected calibration error (Guo et al., arXiv 1706.04599, eq. 3) over 15 bins of
    equal width. "nll" is the mean negative log-probability of the right option in nats. "brier" is the squared error of
    the probabilities, summed over the options and averaged over the questions (Brier, 1950). Raises UserError if a
    log-likelihood is not finite.
    """
    rows = []
    for scores, target in zip(log_likelihoods, targets):
        log_p = log_softmax(scores)
        p = np.exp(log_p)
        rows.append((p.max(), p.argmax() == target, -log_p[target], ((p - (np.arange(len(p)) == target)) ** 2).sum()))
    confidence, correct, nll, brier = (np.array(values, dtype=np.float64) for values in zip(*rows))
    bins = np.clip(np.ceil(confidence * ECE_BINS) - 1, 0, ECE_BINS - 1)  # (0, 1/15], (1/15, 2/15], …
    gaps = [abs((correct - confidence)[bins == index].sum()) for index in range(ECE_BINS)]
    return {"ece": float(sum(gaps) / len(correct)), "nll": float(nll.mean()), "brier": float(brier.mean())}


def average_log_probs(log_likelihoods: Sequence) -> np.ndarray:
    """Log-probabilities of one question's options, with the probabilities averaged over samples of the weights.

    `log_likelihoods` [samples, options] are in nats.
    """
    log_p = log_softmax(log_likelihoods)
    return np.logaddexp.reduce(log_p, axis=0) - np.log(len(log_p))


def log_softmax(scores: Sequence) -> np.ndarray:
    """Scores [..., options] minus the logarithm of their summed exponentials. Raises UserError if one is not finite."""
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"log-likelihoods of options are not finite: {values.tolist()!s:.200}")
    return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)
