"""The order of samples, and micro-batches."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corpus.tasks import SFTDataset, read_task
from model.loss import IGNORE_INDEX
from model.tokenizer import Tokenizer
from training.batches import collate, count_tokens, make_microbatches, plan_microbatches, sample_indices, shared_prefix
from training.train_config import TrainConfig


def random_samples(count, seed=0):
    generator = np.random.default_rng(seed)
    return [(generator.integers(1, 500, length + 1), int(generator.integers(1, length + 1)))
            for length in generator.integers(2, 60, count).tolist()]


def cut(samples, max_tokens, overhead, rank=0, world_size=1):
    """The micro-batches of a rank."""
    cfg = TrainConfig(max_tokens_per_microbatch=max_tokens, microbatch_overhead_tokens=overhead)
    return make_microbatches(cfg, SimpleNamespace(rank=rank, world_size=world_size), samples)


def test_plan_has_the_lowest_cost_of_all_plans():
    generator = np.random.default_rng(1)
    for _ in range(20):
        lengths = sorted(generator.integers(1, 200, 9).tolist(), reverse=True)
        max_tokens, overhead = int(generator.integers(150, 900)), int(generator.integers(0, 100))

        def cost(boundaries, lengths=lengths, max_tokens=max_tokens, overhead=overhead):
            pairs = list(zip(boundaries, boundaries[1:]))
            padded = [(stop - start) * lengths[start] for start, stop in pairs]
            fits = all(size <= max_tokens or stop - start == 1 for size, (start, stop) in zip(padded, pairs))
            return sum(padded) + overhead * len(padded) if fits else float("inf")

        plans = ([0, *inner, 9] for n in range(9) for inner in itertools.combinations(range(1, 9), n))
        assert cost(plan_microbatches(lengths, max_tokens, overhead)) == min(map(cost, plans))


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_ranks_split_a_global_batch_into_equal_numbers_of_microbatches(world_size, count, shared):
    prompt = np.arange(shared) + 600
    samples = [(np.concatenate((prompt, tokens)), shared + first) for tokens, first in random_samples(count)]
    ranks = [cut(samples, 256, 32, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    actual = []
    for input_ids, targets, prefix in itertools.chain.from_iterable(ranks):
        assert prefix.tolist() == (prompt.tolist() if count > 1 else [])  # a single sample has no shared prefix
        assert input_ids.shape == targets.shape
        assert len(prefix) + input_ids.numel() <= max(256, len(prefix) + input_ids.shape[1])
        for ids, row in zip(input_ids.tolist(), targets.tolist()):
            positions = [position for position, target in enumerate(row) if target != IGNORE_INDEX]
            if positions:
                actual.append((tuple(prefix.tolist() + ids[:positions[-1] + 1]),
                               tuple(row[position] for position in positions)))
    expected = [(tuple(tokens[:-1].tolist()), tuple(tokens[first:].tolist())) for tokens, first in samples]
    assert sorted(actual) == sorted(expected)


@pytest.mark.parametrize(("samples", "prefix"), [
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 3, 5, 9], 4)], [1, 2, 3]),
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 3, 4, 8], 4)], [1, 2, 3]),  # the last prompt token predicts a target
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 9, 9, 9], 2)], [1]),
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 3, 4, 9], 1)], []),  # all tokens are targets
    ([([1, 2, 3, 4, 9], 4), ([7, 2, 3, 4, 9], 4)], []),
    ([([1, 2, 3, 4, 9], 4)], [])])
def test_shared_prefix(samples, prefix):
    assert shared_prefix([(np.array(tokens), first) for tokens, first in samples]).tolist() == prefix


def test_the_prefix_counts_as_overhead_of_a_microbatch():
    """A second micro-batch would save 36 tokens of padding, but compute the prefix of 99 tokens again."""
    samples = [(np.arange(length + 1), 100) for length in (140, 104)]
    assert [tuple(ids.shape) for ids, *_ in cut(samples, 4096, 0)] == [(2, 41)]


def test_order_is_a_function_of_seed_and_position():
    first, second = ([index for start in range(epoch, epoch + 10, 5)
                      for index in sample_indices(42, 10, start, start + 5)] for epoch in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))  # each epoch has each sample once
    assert first != second
    assert sample_indices(42, 10, 3, 13) == (first + second)[3:13]  # batches of any size, across epochs
    assert sample_indices(43, 10, 0, 10) not in (first, second)


def test_padding_of_simp_is_a_few_percent(tokenizer_dir, simp_file):
    splits = read_task(simp_file)[0]
    data = SFTDataset(splits["train"] + splits["test"], Tokenizer(tokenizer_dir), 1024, 256)
    for world_size in (1, 2):
        read = repeated = computed = 0
        for start in range(0, len(data) - 31, 32):
            samples = [data[index] for index in sample_indices(42, len(data), start, start + 32)]
            microbatches = [microbatch for rank in range(world_size)
                            for microbatch in cut(samples, 4096, 32, rank, world_size)]
            read += count_tokens(samples)[0]
            repeated += (len(samples) - len(microbatches)) * len(microbatches[0][2])  # tokens of the shared prefix
            computed += sum(len(prefix) + input_ids.numel() for input_ids, _, prefix in microbatches)
        assert 0 < 1 - (read - repeated) / computed < 0.07
        assert computed / read < 0.8


def test_a_row_longer_than_the_limit_is_a_microbatch_of_its_own():
    assert plan_microbatches([900, 30, 20], 100, 32) == [0, 1, 3]
    assert collate([])[1].tolist() == [[IGNORE_INDEX]]
    assert torch.equal(*collate([(np.array([5, 5]), 1)]))


def test_the_order_of_samples_stays_as_it_is():
    """An update that changed it would resume runs on other samples."""
    assert sample_indices(42, 10, 0, 20) == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8, 0, 8, 7, 4, 3, 1, 2, 9, 6, 5]
