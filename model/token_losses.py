"""Losses of samples, and how far a model's predictions of them have moved from those of a reference model.

Dimensions:  N rows of hidden states, n rows of a chunk, C hidden size, V vocabulary.
"""
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import UserError
from model.logits import why_not_finite
from model.loglikelihood import Progress, plan_targets, scored_targets
from model.transformer import Transformer

Sample = tuple[np.ndarray, int]  # token ids, and the index of the first one that is a target


@torch.no_grad()
def sample_losses(model: Transformer, samples: Sequence[Sample], reference: Transformer | None = None,
                  max_tokens: int = 4096, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the negative log-likelihood of each sample in nats, summed over its targets, and the KL divergence.

    The divergence is KL(reference || model) of the next token (Shenfeld et al., arXiv 2509.04259), exact over the
    vocabulary, summed over the positions that predict a target; None without a reference, which must have the same
    vocabulary. Nothing is padded, and a common prefix of samples is computed once, in passes of `max_tokens` tokens.
    Raises UserError if a logit or a sum is not finite.
    """
    def score(logits: list[Tensor], row: Tensor, target: Tensor) -> list[Tensor]:
        log_q, *log_p = (scores.log_softmax(-1) for scores in logits)  # n V each
        divergences = [F.kl_div(log_q, start, reduction="none", log_target=True).sum(-1) for start in log_p]
        return [-log_q[row, target], *(one.clamp(min=0)[row] for one in divergences)]  # rounding can make it negative

    models = [model] if reference is None else [model, reference]
    sums = np.zeros((len(models), len(samples)))
    sequences, targets = plan_targets([ids[:-1] for ids, _ in samples], [ids[first:] for ids, first in samples])
    for requests, scores in scored_targets(models, sequences, targets, score, max_tokens, progress):
        for total, values in zip(sums, scores):
            np.add.at(total, requests, values)
    if not np.isfinite(sums).all():
        raise UserError(f"a loss is not finite: {why_not_finite(model)}")
    return sums[0], None if reference is None else sums[1]
