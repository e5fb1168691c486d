"""What a step sees: samples, their order, and global batches cut into micro-batches.

A sample is a pair (tokens, first): an array of token ids, and the index of the first token that is a target. The
model reads tokens[:-1] and is asked for tokens[1:]; its length is the number of tokens that it reads. Fine-tuning
and pretraining differ in where their samples come from and in nothing else.
"""
from functools import lru_cache

import numpy as np
import torch

from model.loss import IGNORE_INDEX
from model.prefix_packing import common_prefix


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The order of the samples in one epoch: a function of these three numbers alone."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def global_batch(seed, size, start, stop):
    """Indices of the samples at the places start ≤ i < stop of the endless stream of shuffled epochs."""
    return [int(epoch_order(seed, place // size, size)[place % size]) for place in range(start, stop)]


def plan_microbatches(lengths, budget, step_slots):
    """Where to cut rows, sorted from long to short, into micro-batches: [0, …, len(lengths)].

    Minimises padded slots plus `step_slots` for each micro-batch, by dynamic programming over the cuts: a micro-step
    has a fixed price (kernel launches, a pass over the weights, from ZeRO-2 on a reduction of all gradients), and the
    padding that one more micro-batch saves has to be worth it. No micro-batch has more than `budget` slots, except a
    single row that is longer than that.
    """
    best, previous = [0] + [None] * len(lengths), [0] * (len(lengths) + 1)
    for start, length in enumerate(lengths):
        for stop in range(start + 1, len(lengths) + 1):
            slots = (stop - start) * length
            if slots > budget and stop > start + 1:
                break
            cost = best[start] + slots + step_slots
            if best[stop] is None or cost < best[stop]:
                best[stop], previous[stop] = cost, start
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(previous[cuts[-1]])
    return cuts[::-1]


def make_microbatches(samples, budget, step_slots, rank=0, world_size=1):
    """Cuts a global batch, and returns this rank's micro-batches: (input_ids, targets) [B, T] and the prefix [P] that
    stands before each row of all of them, the beginning that the prompts of the global batch have in common.

    The samples are sorted by length and dealt out in turn, so every rank has nearly the same lengths; all are cut at
    the same places, those that suit rank 0, and so run the same number of micro-steps. A rank with no sample left
    gets a row without a target.
    """
    samples = sorted(samples, key=lambda sample: -len(sample[0]))
    prefix = shared_prefix(samples)
    shared = len(prefix)
    cuts = plan_microbatches([len(tokens) - 1 - shared for tokens, _ in samples[::world_size]], budget - shared, step_slots + shared)
    mine = [(tokens[shared:], first - shared) for tokens, first in samples[rank::world_size]]
    return [(*collate(mine[start:stop]), torch.from_numpy(prefix)) for start, stop in zip(cuts, cuts[1:])]


def shared_prefix(samples):
    """The tokens that all samples begin with before the last of their prompt, which is asked for the first target; none
    for a single sample."""
    tokens, first = min(samples, key=lambda sample: sample[1])
    prompt = tokens[:first - 1]
    return prompt[:min(common_prefix(prompt, other) for other, _ in samples) if len(samples) > 1 else 0]


def collate(samples):
    """Pads samples on the right: input_ids and targets [B, T], IGNORE_INDEX where there is no target."""
    width = max((len(tokens) - 1 for tokens, _ in samples), default=1)
    input_ids = np.zeros((max(1, len(samples)), width), dtype=np.int64)
    targets = np.full(input_ids.shape, IGNORE_INDEX, dtype=np.int64)
    for row, (tokens, first) in enumerate(samples):
        input_ids[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, first - 1:len(tokens) - 1] = tokens[first:]
    return torch.from_numpy(input_ids), torch.from_numpy(targets)


def count_tokens(samples):
    """(tokens read, tokens with a target) of samples, in all."""
    return sum(len(tokens) - 1 for tokens, _ in samples), sum(len(tokens) - first for tokens, first in samples)
