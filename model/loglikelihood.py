"""Log-likelihoods of continuations after contexts; what the texts have in common is computed once."""
from collections import defaultdict

import numpy as np
import torch

from model.prefix_packing import common_prefix, packed_passes, sort_sequences, trim

LOGITS_AT_ONCE = 1 << 23  # N·V of a slice of logits, 32 MiB in fp32: larger ones are slower a row on a CPU


def cut_left(context, continuation, max_length):
    """(token ids that the model reads, how many of the last of them have a target) of a pair.

    What is longer than the model's context loses its beginning, as in lm-eval's own backend: the last max_length + 1
    tokens stay, of which the model reads all but the last.
    """
    return (context + continuation)[-(max_length + 1):][:-1], len(continuation)


@torch.no_grad()
def log_likelihoods(model, pairs, budget=4096, progress=None):
    """log p(continuation | context) of each pair of token id lists, in nats, and whether greedy decoding gives it.

    budget: tokens of a forward pass. progress: called with a number of pairs whenever so many are done. Also returns
    {"computed", "asked"}: tokens that went through the model, and those of all pairs one by one.
    """
    read = [cut_left(*pair, model.config.max_position_embeddings) for pair in pairs]
    sequences, places = sort_sequences([ids for ids, _ in read])
    wanted = owners([(place, len(ids) - count, pair[1]) for (ids, count), place, pair in zip(read, places, pairs)],
                    sequences)
    sums, greedy, left = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool), [count for _, count in read]
    computed = 0
    for segments, hidden in packed_passes(model, sequences, budget):
        computed += len(hidden)
        rows, targets, owner = [], [], []
        for segment in segments:
            for position, target, pair in wanted.get(segment.sequence, ()):
                if segment.start <= position < segment.stop:
                    rows.append(segment.offset + position - segment.start)
                    targets.append(target)
                    owner.append(pair)
        if not rows:
            continue
        rows, where = np.unique(rows, return_inverse=True)  # a position may have several targets
        values, matches = token_scores(model, hidden[torch.from_numpy(rows).to(hidden.device)], where, targets)
        np.add.at(sums, owner, values)
        np.logical_and.at(greedy, owner, matches)
        for pair in owner:
            left[pair] -= 1
            if progress and not left[pair]:
                progress(1)
    return list(zip(sums.tolist(), greedy.tolist())), {"computed": computed, "asked": sum(len(ids) for ids, _ in read)}


def owners(requests, sequences):
    """Which sequence brings the position of each target: {sequence: [(position, target, request)]}.

    requests: (sequence, position of the first target, target ids). A position in a prefix belongs to the first of the
    sequences, in sorted order, that have it.
    """
    of_sequence = defaultdict(list)
    for index, (place, first, targets) in enumerate(requests):
        of_sequence[place].append((index, first, targets))
    wanted, path = defaultdict(list), []
    for place, ids in enumerate(sequences):
        path = trim(path, common_prefix(sequences[place - 1], ids) if place else 0) + [(place, len(ids))]
        starts = [0] + [stop for _, stop in path]
        for index, first, targets in of_sequence[place]:
            for (owner, stop), start in zip(path, starts):
                wanted[owner] += [(position, targets[position - first], index)
                                  for position in range(max(start, first), min(stop, first + len(targets)))]
    return wanted


def token_scores(model, hidden, rows, targets):
    """log p of each target after hidden[row] [N, C], and whether it is the most probable token, as arrays.

    The logits exist in slices of LOGITS_AT_ONCE.
    """
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    values, matches = np.empty(len(rows)), np.empty(len(rows), dtype=bool)
    targets = np.asarray(targets)
    for start in range(0, len(hidden), size):
        logits = model.lm_head(hidden[start:start + size]).float()  # N V
        inside = np.flatnonzero((rows >= start) & (rows < start + size))
        row, target = (torch.from_numpy(x).to(logits.device) for x in (rows[inside] - start, targets[inside]))
        values[inside] = logits.log_softmax(-1)[row, target].cpu().numpy()
        matches[inside] = (logits.argmax(-1)[row] == target).cpu().numpy()
    return values, matches
