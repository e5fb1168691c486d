"""Measures of generated texts and of predictions: pure functions.

Scores of texts are percentages, as sacrebleu prints them.
"""
import functools
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from model.files import UserError

RESAMPLES = 1000
ECE_BINS = 15


def interval(values, seed=0):
    """{"mean", "low", "high"} of a sample: its mean and the percentile bootstrap's 95% interval (Efron, 1979)."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


# ---------------------------------------------------------------------------------------------------- generated texts

def bleu(predictions, references):
    """Corpus BLEU of sacrebleu (tokenizer 13a; Papineni et al., 2002; Post, arXiv 1804.08771) with its 95% interval.

    references: for each prediction a list of texts, not all of one length. The score is that of the whole corpus, the
    interval that of sacrebleu's bootstrap over the samples.
    """
    from sacrebleu.metrics import BLEU
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    score = BLEU(tokenize="13a").corpus_score(predictions, streams, n_bootstrap=RESAMPLES)
    return {"mean": score.score, "low": score._mean - score._ci, "high": score._mean + score._ci}


def rouge(predictions, references):
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) of each prediction, by rouge-score without stemming: {name: list}.

    Of several references the best one counts, for each of the three by itself.
    """
    from rouge_score.rouge_scorer import RougeScorer
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references)]
    return {name: [100 * score[name].fmeasure for score in scores] for name in names}


@functools.cache
def tokenizer_13a():
    """sacrebleu's tokenizer of that name."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    return Tokenizer13a()


def sari(source, prediction, references):
    """SARI of one simplification (Xu et al., 2016, section 4) by the definition of Hugging Face's metric of that name.

    The mean over n-grams of 1 to 4 words of three scores against all references: F1 of what is kept of the source, the
    precision of what is deleted, F1 of what is added. Texts are lower-cased and split by the 13a tokenizer; 0/0 is 1.
    An empty text is one empty word, as there.
    """
    words = [tokenizer_13a()(text.lower()).split(" ") for text in (source, prediction, *references)]
    scores = [sari_of_ngrams(*(Counter(ngrams(text, size)) for text in words)) for size in range(1, 5)]
    return 100 * statistics.fmean(statistics.fmean(part) for part in zip(*scores))


def ngrams(words, size):
    """All runs of `size` words."""
    return [tuple(words[start:start + size]) for start in range(len(words) - size + 1)]


def sari_of_ngrams(source, prediction, *references):
    """(keep, delete, add) of SARI for the counts of n-grams of one size.

    Counts of source and prediction are taken once for each reference, to compare with those of all references together.
    """
    times = len(references)
    wanted = sum(references, Counter())
    source, prediction = (Counter({gram: times * count for gram, count in text.items()})
                          for text in (source, prediction))
    kept, keepable = source & prediction, source & wanted
    good = kept & wanted
    keep = f1(ratio(sum(count / kept[gram] for gram, count in good.items()), len(kept)),
              ratio(sum(good.values()), sum(keepable.values())))
    deleted = source - prediction
    delete = ratio(sum(count / deleted[gram] for gram, count in (deleted - wanted).items()), len(deleted))
    added, addable = prediction.keys() - source.keys(), wanted.keys() - source.keys()
    right = len(added & addable)
    return keep, delete, f1(ratio(right, len(added)), ratio(right, len(addable)))


def ratio(part, whole):
    """part / whole, and 1 for nothing of nothing."""
    return part / whole if whole else 1.0


def f1(precision, recall):
    """The harmonic mean, 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def bertscore(predictions, references, directory, layer):
    """F1 of BERTScore (Zhang et al., arXiv 1904.09675) of each prediction, in percent, without a baseline subtracted.

    directory and layer: of the encoder, which the package bert-score loads; that is no requirement of this program, and
    a UserError says so where it is missing.
    """
    try:
        from bert_score import score
    except ImportError:
        raise UserError("BERTScore needs a package that is not installed: pip install bert-score") from None
    _, _, f1_scores = score(predictions, references, model_type=str(directory), num_layers=layer)
    return (100 * f1_scores).tolist()


def health(predictions, sources):
    """What tells a broken model from a bad score, for each text: {"words": its length, "empty": %, "copied": %}."""
    pairs = [(text.split(), source.split()) for text, source in zip(predictions, sources)]
    return {"words": [len(words) for words, _ in pairs], "empty": [100.0 * (not words) for words, _ in pairs],
            "copied": [100.0 * (bool(words) and words == source) for words, source in pairs]}


# --------------------------------------------------------------------------------------------------------- predictions

def calibration(log_likelihoods, targets):
    """How well the probabilities of options are calibrated: {"ece", "nll", "brier"}.

    log_likelihoods: of each question's options, in nats; their softmax is taken as the probabilities. targets: the
    index of the right option of each. "ece" is the expected calibration error (Guo et al., arXiv 1706.04599, eq. 3)
    over 15 bins of equal width, "nll" the mean negative log-probability of the right option in nats, "brier" the mean
    squared distance of the probabilities from the truth, summed over the options (Brier, 1950).
    """
    confidences, right, nll, brier = [], [], [], []
    for scores, target in zip(log_likelihoods, targets):
        scores = np.asarray(scores, dtype=np.float64)
        log_p = scores - np.logaddexp.reduce(scores)
        p = np.exp(log_p)
        confidences.append(p.max())
        right.append(p.argmax() == target)
        nll.append(-log_p[target])
        brier.append(((p - (np.arange(len(p)) == target)) ** 2).sum())
    confidences, right = np.array(confidences), np.array(right, dtype=np.float64)
    bins = np.clip(np.ceil(confidences * ECE_BINS) - 1, 0, ECE_BINS - 1)  # (0, 1/15], (1/15, 2/15], …
    gaps = [abs((right - confidences)[bins == index].sum()) for index in range(ECE_BINS)]
    return {"ece": float(sum(gaps) / len(right)), "nll": float(np.mean(nll)), "brier": float(np.mean(brier))}


def averaged(draws):
    """The log-probabilities of a question's options, averaged as probabilities over draws of the weights.

    draws: for each draw the log-likelihoods of the options, in nats, whose softmax is taken.
    """
    scores = np.asarray(draws, dtype=np.float64)
    log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return np.logaddexp.reduce(log_p, axis=0) - np.log(len(scores))


# ---------------------------------------------------------------------------------------------------------- forgetting

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
