"""Log-likelihoods of continuations given contexts. Common prefixes are computed once.

Dimensions:  N rows of hidden states, n rows of a chunk, C hidden size, V vocabulary.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.files import UserError
from model.logits import finite_logits
from model.loss import chunk_rows
from model.prefix_packing import packed_passes, sort_sequences, tree_rows
from model.transformer import Transformer

Ids = Sequence[int] | np.ndarray
Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation
# Scores of targets, some tensors [n], given the logits of each model, and the row of each target in them and its id.
Score = Callable[[list[Tensor], Tensor, Tensor], list[Tensor]]
Progress = Callable[[int], object]  # called with the number of requests that were finished since the last call


def truncate_left(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """Returns the input ids of a pair: its last max_length + 1 tokens without the last one, which is only a target (as
    in lm-eval)."""
    return (context + continuation)[-(max_length + 1):][:-1]


@dataclass(frozen=True)
class Targets:
    """The targets of requests, in order of the rows (see `tree_rows`) whose logits predict them."""
    rows: np.ndarray
    ids: np.ndarray
    requests: np.ndarray  # the index of the request that each target belongs to

    def between(self, start: int, stop: int) -> "Targets":
        """The targets of the rows from `start` to `stop`, with rows counted from `start`."""
        part = slice(*np.searchsorted(self.rows, (start, stop)))
        return Targets(self.rows[part] - start, self.ids[part], self.requests[part])


def plan_targets(inputs: Sequence[Ids], targets: Sequence[Ids]) -> tuple[list[np.ndarray], Targets]:
    """Returns the sorted sequences to compute for requests, and their targets.

    inputs: token ids of each request. targets: ids of the tokens that its last positions predict. Raises UserError for
    a request with more targets than positions, or with none.
    """
    if wrong := [index for index, (ids, predicted) in enumerate(zip(inputs, targets))
                 if not 0 < len(predicted) <= len(ids)]:
        raise UserError(f"request {wrong[0]} has {len(targets[wrong[0]])} target tokens and {len(inputs[wrong[0]])} "
                        "input tokens: expected 1 to as many targets as inputs; a longer target does not fit into the "
                        "model's context")
    sequences, places = sort_sequences(inputs)
    by_sequence: list[list[int]] = [[] for _ in sequences]
    for request, place in enumerate(places):
        by_sequence[place].append(request)
    found = [(row, target, request)
             for positions, requests in zip(tree_rows(sequences), by_sequence) for request in requests
             for row, target in zip(positions[len(positions) - len(targets[request]):].tolist(), targets[request])]
    return sequences, Targets(*np.array(sorted(found), dtype=np.int64).reshape(-1, 3).T)


def target_scores(models: Sequence[Transformer], hidden: Sequence[Tensor], targets: Targets,
                  score: Score) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Computes the logits of rows with targets in chunks, so that those of many rows never exist at once, and scores
    them.

    models, hidden: one or more models, and the final hidden states [N, C] of each. Yields the request of each target of
    a chunk, and its scores. Raises UserError if a logit is not finite.
    """
    rows, inverse = np.unique(targets.rows, return_inverse=True)  # a row may have several targets
    device = models[0].lm_head.weight.device
    states = [block[torch.from_numpy(rows).to(device)] for block in hidden]
    size = chunk_rows(models[0].config.vocab_size, device.type)
    for start in range(0, len(rows), size):
        inside = slice(*np.searchsorted(inverse, (start, start + size)))
        row, target = (torch.from_numpy(x).to(device) for x in (inverse[inside] - start, targets.ids[inside]))
        logits = zip(models, (block[start:start + size] for block in states), ("the model", "the reference"))
        yield targets.requests[inside], [values.cpu().numpy() for values in score(
            [finite_logits(*each) for each in logits], row, target)]


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


def scored_targets(models: Sequence[Transformer], sequences: Sequence[np.ndarray], targets: Targets, score: Score,
                   max_tokens: int, progress: Progress | None) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Runs models over requests in passes of `max_tokens` tokens, in which common prefixes are computed once.

    Yields chunks of the targets (see `plan_targets`): the request of each, and its scores. Raises UserError if a logit
    is not finite.
    """
    remaining, row = np.bincount(targets.requests), 0
    for hidden in aligned([(states for _, states in packed_passes(model, sequences, max_tokens)) for model in models]):
        part = targets.between(row, row + len(hidden[0]))
        row += len(hidden[0])
        yield from target_scores(models, hidden, part, score)
        np.subtract.at(remaining, part.requests, 1)
        if progress and (finished := int((remaining[np.unique(part.requests)] == 0).sum())):
            progress(finished)


@torch.no_grad()
def log_likelihoods(model: Transformer, pairs: Sequence[Pair], max_tokens: int = 4096,
                    progress: Progress | None = None) -> tuple[list[tuple[float, bool]], dict[str, int]]:
    """Returns log p(continuation | context) of each pair in nats, and whether it is the greedy continuation.

    Also returns {"computed", "asked"}: the tokens that the model computed, in passes of `max_tokens` tokens, and the
    input tokens of all pairs, without sharing. Raises UserError if a logit is not finite.
    """
    inputs = [truncate_left(*pair, model.config.max_position_embeddings) for pair in pairs]
    def score(logits: list[Tensor], row: Tensor, target: Tensor) -> list[Tensor]:
        return [logits[0].log_softmax(-1)[row, target], logits[0].argmax(-1)[row] == target]

    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    sequences, targets = plan_targets(inputs, [continuation for _, continuation in pairs])
    for requests, (log_p, is_greedy) in scored_targets([model], sequences, targets, score, max_tokens, progress):
        np.add.at(sums, requests, log_p)
        np.logical_and.at(greedy, requests, is_greedy)
    computed = int(targets.rows.max(initial=-1)) + 1  # the last position of every request predicts a target
    return list(zip(sums.tolist(), greedy.tolist())), {"computed": computed, "asked": sum(map(len, inputs))}
