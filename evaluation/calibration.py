"""Calibration of the probabilities of multiple-choice options."""
import numpy as np

ECE_BINS = 15


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
