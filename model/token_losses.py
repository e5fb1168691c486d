"""Losses of samples, and how far a model's predictions of them have moved from those of a reference model.

Dimensions:  N rows of hidden states, n rows of a chunk, C hidden size, V vocabulary.
"""
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import UserError
from model.loglikelihood import Progress, Targets, plan_targets, report_finished, target_logits
from model.prefix_packing import packed_passes
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
    sequences, targets = plan_targets([ids[:-1] for ids, _ in samples], [ids[first:] for ids, first in samples])
    models = [model] if reference is None else [model, reference]
    sums = np.zeros((len(models), len(samples)))
    remaining = np.bincount(targets.requests, minlength=len(samples))
    row = 0
    for hidden in aligned([(states for _, states in packed_passes(one, sequences, max_tokens)) for one in models]):
        part = targets.between(row, row + len(hidden[0]))
        row += len(hidden[0])
        for values, total in zip(token_losses(models, hidden, part), sums):
            np.add.at(total, part.requests, values)
        report_finished(part, remaining, progress)
    if not np.isfinite(sums).all():
        raise UserError("the loss is not finite: the weights are damaged")
    return sums[0], None if reference is None else sums[1]


def aligned(streams: Sequence[Iterator[Tensor]]) -> Iterator[list[Tensor]]:
    """Yields blocks of the same rows of all streams. The streams have the same rows, but cut them in other places.

    Passes of two models differ after one of them has run out of memory.
    """
    rest = [torch.empty(0)] * len(streams)  # of the last block of each stream
    while True:
        rest = [block if len(block) else next(stream, block) for stream, block in zip(streams, rest)]
        if not (size := min(map(len, rest))):
            return
        yield [block[:size] for block in rest]
        rest = [block[size:] for block in rest]


def token_losses(models: Sequence[Transformer], hidden: Sequence[Tensor], targets: Targets) -> np.ndarray:
    """Returns the negative log-likelihood of each target, and with a second model KL(second || first) at its row.

    hidden: the final hidden states [N, C] of each model. The result has a line for each model: [1|2, targets].
    """
    values = np.empty((len(models), len(targets.ids)))
    for part, logits, row, target in target_logits(models, hidden, targets):
        log_q, *log_p = (scores.log_softmax(-1) for scores in logits)  # n V each
        values[0, part] = -log_q[row, target].cpu().numpy()
        if log_p:
            divergence = F.kl_div(log_q, log_p[0], reduction="none", log_target=True).sum(-1)
            values[1, part] = divergence.clamp(min=0)[row].cpu().numpy()  # rounding can make it negative
    return values
