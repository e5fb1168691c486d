"""Log-likelihoods of continuations given contexts. Common prefixes are computed once.

Dimensions:  N tokens with a target, C hidden size, V vocabulary.
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from model.logits import finite_logits
from model.prefix_packing import common_prefix, packed_passes, sort_sequences, trim_path
from model.transformer import Transformer

MAX_LOGITS = 1 << 23  # N·V of a chunk, 32 MiB in fp32: larger chunks are slower per row on a CPU

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation


def truncate_left(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """Returns the input ids of a pair: all but the last of the last max_length + 1 tokens, as lm-eval's own backend."""
    return (context + continuation)[-(max_length + 1):][:-1]


@torch.no_grad()
def log_likelihoods(model: Transformer, pairs: Sequence[Pair], max_tokens: int = 4096,
                    progress: Callable[[int], object] | None = None
                    ) -> tuple[list[tuple[float, bool]], dict[str, int]]:
    """Returns log p(continuation | context) of each pair in nats, and whether it is the greedy continuation.

    Also returns {"computed", "asked"}: the tokens that the model computed, in passes of `max_tokens` tokens, and the
    tokens of all pairs. `progress` is called with the number of pairs that were finished since the last call. Raises
    UserError if a logit is not finite.
    """
    inputs = [truncate_left(*pair, model.config.max_position_embeddings) for pair in pairs]
    sequences, places = sort_sequences(inputs)
    targets_of = assign_targets([(place, len(ids) - len(targets), targets)
                                 for place, ids, (_, targets) in zip(places, inputs, pairs)], sequences)
    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    remaining = [len(targets) for _, targets in pairs]  # without a log-likelihood yet
    computed = 0
    for segments, hidden in packed_passes(model, sequences, max_tokens):
        computed += len(hidden)
        scored = [(segment.offset + position - segment.start, target, pair)
                  for segment in segments for position, target, pair in targets_of.get(segment.sequence, ())
                  if segment.start <= position < segment.stop]
        if not scored:
            continue
        positions, targets, owners = map(list, zip(*scored))
        rows, inverse = np.unique(positions, return_inverse=True)  # a position may have several targets
        values, matches = token_scores(model, hidden[torch.from_numpy(rows).to(hidden.device)], inverse, targets)
        np.add.at(sums, owners, values)
        np.logical_and.at(greedy, owners, matches)
        for pair in owners:
            remaining[pair] -= 1
            if progress and not remaining[pair]:
                progress(1)
    return list(zip(sums.tolist(), greedy.tolist())), {"computed": computed, "asked": sum(map(len, inputs))}


def assign_targets(requests: Iterable[tuple[int, int, list[int]]],
                   sequences: Sequence[np.ndarray]) -> dict[int, list[tuple[int, int, int]]]:
    """Assigns each target to the sequence that computes its position: {sequence: [(position, target, request)]}.

    A request is (sequence, position of the first target, target ids). A position in a common prefix is computed by the
    first of the sorted sequences that contains it.
    """
    by_sequence = defaultdict(list)
    for request, (place, first, targets) in enumerate(requests):
        by_sequence[place].append((request, first, targets))
    assigned: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    path: list[tuple[int, int]] = []
    for place, ids in enumerate(sequences):
        path = trim_path(path, common_prefix(sequences[place - 1], ids) if place else 0) + [(place, len(ids))]
        starts = [0, *(stop for _, stop in path)]
        for request, first, targets in by_sequence[place]:
            for (owner, stop), start in zip(path, starts):
                assigned[owner] += [(position, targets[position - first], request)
                                    for position in range(max(start, first), min(stop, first + len(targets)))]
    return assigned


def token_scores(model: Transformer, hidden: torch.Tensor, rows: np.ndarray,
                 targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p of each target given hidden[row] [N, C], and whether it is the most probable token."""
    size = max(1, MAX_LOGITS // model.config.vocab_size)
    values, matches = np.empty(len(rows)), np.empty(len(rows), dtype=bool)
    target_ids = np.asarray(targets)
    for start in range(0, len(hidden), size):
        logits = finite_logits(model, hidden[start:start + size])  # N V
        inside = np.flatnonzero((rows >= start) & (rows < start + size))
        row, target = (torch.from_numpy(x).to(logits.device) for x in (rows[inside] - start, target_ids[inside]))
        values[inside] = logits.log_softmax(-1)[row, target].cpu().numpy()
        matches[inside] = (logits.argmax(-1)[row] == target).cpu().numpy()
    return values, matches
