"""Global batches and how they are cut into micro-batches.

A sample is a pair (tokens, first): an array of token ids and the index of the first token that is a target. The model
reads tokens[:-1] and its targets are tokens[1:]; the length of a sample is the number of tokens read.

Dimensions:  B rows of a micro-batch, T tokens of the longest row, P tokens of a common prefix.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch

from common.distributed import Distributed, to_device
from model.loss import IGNORE_INDEX
from model.prefix_packing import common_prefix
from model.token_losses import Sample
from training.train_config import TrainConfig

Microbatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input_ids [B, T], targets [B, T], prefix [P]


class SampleDataset(Protocol):
    """A sequence of samples, such as SFTDataset and ShardDataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step, over all ranks."""
    indices: list[int]  # in the training data
    samples: list[Sample]
    replay_indices: list[int]  # in the windows of the pretraining text
    replay: list[Sample]
    ends_epoch: bool

    def __str__(self) -> str:
        return f"samples {self.indices}" + (f", windows {self.replay_indices}" if self.replay else "")

    @property
    def groups(self) -> list[list[Sample]]:
        """The samples of the task and the replayed windows, apart: in one group they would have no common prefix."""
        return [self.samples, self.replay] if self.replay else [self.samples]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return count_tokens(self.samples + self.replay)[0]


@lru_cache(maxsize=8)  # a step may read several streams, at the ends of their epochs two orders each
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the samples in one epoch, a function of the three arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return order.astype(np.min_scalar_type(size))  # of 300B tokens in samples of 2,048 0.6 GB instead of 1.2 GB


def sample_indices(seed: int, size: int, start: int, stop: int) -> list[int]:
    """Indices of the samples at positions start ≤ i < stop in the infinite stream of shuffled epochs."""
    return [int(epoch_order(seed, place // size, size)[place % size]) for place in range(start, stop)]


def replayed_range(step: int, share: float, batch_size: int) -> range:
    """The positions of a step's samples among all that are replayed: `share` times the batch size on average, which may
    be below one."""
    return range(int(step * share * batch_size), int((step + 1) * share * batch_size))


def replay_in_epochs(seed: int, size: int, step: int, share: float, batch_size: int) -> list[int]:
    """Indices of the samples that a step replays, in shuffled epochs."""
    places = replayed_range(step, share, batch_size)
    return sample_indices(seed, size, places.start, places.stop)


def replay_with_replacement(seed: int, size: int, step: int, share: float, batch_size: int) -> list[int]:
    """Indices of the samples that a step replays, drawn with replacement: an order of all windows of a pretraining text
    would take gigabytes."""
    count = len(replayed_range(step, share, batch_size))
    return np.random.default_rng([seed, step]).integers(size, size=count).tolist()


def plan_microbatches(lengths: Sequence[int], max_tokens: int, overhead: int) -> list[int]:
    """Boundaries [0, …, len(lengths)] that cut rows, sorted from long to short, into micro-batches.

    Minimizes the padded tokens plus `overhead` for each micro-batch, by dynamic programming over the boundaries. A
    micro-step has a fixed cost (kernel launches, a pass over the weights, with ZeRO-2 and 3 a reduction of all
    gradients), which the padding saved by one more micro-batch has to exceed. A micro-batch has at most `max_tokens`
    padded tokens, unless a single row is longer.
    """
    best: list[float] = [0] + [float("inf")] * len(lengths)
    previous = [0] * (len(lengths) + 1)
    for start, length in enumerate(lengths):
        for stop in range(start + 1, len(lengths) + 1):
            padded = (stop - start) * length
            if padded > max_tokens and stop > start + 1:
                break
            if (cost := best[start] + padded + overhead) < best[stop]:
                best[stop], previous[stop] = cost, start
    boundaries = [len(lengths)]
    while boundaries[-1]:
        boundaries.append(previous[boundaries[-1]])
    return boundaries[::-1]


def make_microbatches(cfg: TrainConfig, dist: Distributed, samples: Sequence[Sample]) -> list[Microbatch]:
    """Cuts a global batch into the micro-batches of this rank.

    Returns triples (input_ids [B, T], targets [B, T], prefix [P]). The prefix, which is the same for all micro-batches,
    is what the prompts of the global batch have in common at their start; it precedes every row.

    The samples are sorted by length and distributed over the ranks round-robin, so that all ranks have nearly the same
    lengths. All ranks use the boundaries planned for rank 0 and so run the same number of micro-steps. A rank without a
    sample left gets a row without targets.
    """
    samples = sorted(samples, key=lambda sample: -len(sample[0]))
    prefix = shared_prefix(samples)
    shared = len(prefix)
    boundaries = plan_microbatches([len(tokens) - 1 - shared for tokens, _ in samples[::dist.world_size]],
                                   cfg.max_tokens_per_microbatch - shared, cfg.microbatch_overhead_tokens + shared)
    own = [(tokens[shared:], first - shared) for tokens, first in samples[dist.rank::dist.world_size]]
    return [(*collate(own[start:stop]), torch.from_numpy(prefix)) for start, stop in zip(boundaries, boundaries[1:])]


def shared_prefix(samples: Sequence[Sample]) -> np.ndarray:
    """The common beginning of all prompts, without the last prompt token, which predicts the first target.

    Empty for a single sample.
    """
    tokens, first = min(samples, key=lambda sample: sample[1])
    prompt = tokens[:first - 1]
    return prompt[:min(common_prefix(prompt, other) for other, _ in samples) if len(samples) > 1 else 0]


def to_inputs(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The arguments of the model. The targets stay in host memory, see Transformer."""
    input_ids, targets, prefix = microbatch
    return to_device(input_ids, device), targets, to_device(prefix, device)


def collate(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads samples on the right: input_ids and targets [B, T], with IGNORE_INDEX where there is no target."""
    width = max((len(tokens) - 1 for tokens, _ in samples), default=1)
    input_ids = np.zeros((max(1, len(samples)), width), dtype=np.int64)
    targets = np.full(input_ids.shape, IGNORE_INDEX, dtype=np.int64)
    for row, (tokens, first) in enumerate(samples):
        input_ids[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, first - 1:len(tokens) - 1] = tokens[first:]
    return torch.from_numpy(input_ids), torch.from_numpy(targets)


def count_tokens(samples: Sequence[Sample]) -> tuple[int, int]:
    """(tokens read, target tokens) of all samples."""
    return sum(len(tokens) - 1 for tokens, _ in samples), sum(len(tokens) - first for tokens, first in samples)
