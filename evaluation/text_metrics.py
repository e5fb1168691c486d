"""Metrics of generated texts: pure functions. Scores are percentages, as sacrebleu prints them."""
import functools
import statistics
from collections import Counter

import numpy as np

from common.files import UserError

RESAMPLES = 1000


def interval(values, seed=0):
    """{"mean", "low", "high"} of a sample: its mean and the percentile bootstrap's 95% interval (Efron, 1979)."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


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
