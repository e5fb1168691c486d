"""Samples, their order, and micro-batches."""
import itertools
import json

import numpy as np
import pytest
import torch

from common.files import UserError
from corpus.shards import ShardDataset
from corpus.tasks import PROMPT, RESPONSE, SFTDataset, encode_prompts, read_task
from model.loss import IGNORE_INDEX
from model.tokenizer import Tokenizer
from training.batches import collate, count_tokens, global_batch, make_microbatches, plan_microbatches, shared_prefix


def random_samples(count, seed=0):
    generator = np.random.default_rng(seed)
    return [(generator.integers(1, 500, length + 1), int(generator.integers(1, length + 1)))
            for length in generator.integers(2, 60, count).tolist()]


def test_cuts_are_the_cheapest_of_all():
    generator = np.random.default_rng(1)
    for _ in range(20):
        lengths = sorted(generator.integers(1, 200, 9).tolist(), reverse=True)
        budget, price = int(generator.integers(150, 900)), int(generator.integers(0, 100))

        def cost(cuts, lengths=lengths, budget=budget, price=price):
            sizes = [(stop - start) * lengths[start] for start, stop in zip(cuts, cuts[1:])]
            fits = all(size <= budget or stop - start == 1 for size, start, stop in zip(sizes, cuts, cuts[1:]))
            return sum(sizes) + price * len(sizes) if fits else float("inf")

        every = ([0, *inner, 9] for n in range(9) for inner in itertools.combinations(range(1, 9), n))
        assert cost(plan_microbatches(lengths, budget, price)) == min(map(cost, every))


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_ranks_share_a_global_batch_in_equal_numbers_of_steps(world_size, count, shared):
    beginning = np.arange(shared) + 600
    samples = [(np.concatenate((beginning, tokens)), shared + first) for tokens, first in random_samples(count)]
    ranks = [make_microbatches(samples, 256, 32, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    seen = []
    for input_ids, targets, prefix in itertools.chain.from_iterable(ranks):
        assert prefix.tolist() == (beginning.tolist() if count > 1 else [])  # one sample alone shares nothing
        assert input_ids.shape == targets.shape
        assert len(prefix) + input_ids.numel() <= max(256, len(prefix) + input_ids.shape[1])
        for ids, wanted in zip(input_ids.tolist(), targets.tolist()):
            places = [place for place, target in enumerate(wanted) if target != IGNORE_INDEX]
            if places:
                seen.append((tuple(prefix.tolist() + ids[:places[-1] + 1]), tuple(wanted[place] for place in places)))
    expected = [(tuple(tokens[:-1].tolist()), tuple(tokens[first:].tolist())) for tokens, first in samples]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize(("samples", "shared"), [
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 3, 5, 9], 4)], [1, 2, 3]),
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 3, 4, 8], 4)], [1, 2, 3]),  # the last of the prompt is asked for the target
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 9, 9, 9], 2)], [1]),
    ([([1, 2, 3, 4, 9], 4), ([1, 2, 3, 4, 9], 1)], []),  # the loss falls on all
    ([([1, 2, 3, 4, 9], 4), ([7, 2, 3, 4, 9], 4)], []),
    ([([1, 2, 3, 4, 9], 4)], [])])
def test_shared_prefix(samples, shared):
    assert shared_prefix([(np.array(tokens), first) for tokens, first in samples]).tolist() == shared


def test_a_prefix_is_part_of_the_price_of_a_micro_batch():
    """A second micro-batch would save 36 places and compute the 99 before both rows again."""
    samples = [(np.arange(length + 1), 100) for length in (140, 104)]
    assert [tuple(ids.shape) for ids, *_ in make_microbatches(samples, 4096, 0)] == [(2, 41)]


def test_order_is_a_function_of_seed_and_place():
    first, second = ([index for start in range(at, at + 10, 5) for index in global_batch(42, 10, start, start + 5)]
                     for at in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))  # each epoch has every sample once
    assert first != second
    assert global_batch(42, 10, 3, 13) == (first + second)[3:13]  # batches of any size, across epochs
    assert global_batch(43, 10, 0, 10) != first


def test_task_samples(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    items = [{"input": "Say it.", "output": "It."}, {"input": "x " * 3000, "output": "y " * 3000},
             {"input": f"A whole prompt\n\n{RESPONSE}", "output": "z"}]
    data = SFTDataset(items, tokenizer, 200, 50)
    tokens, first = data[0]
    expected = tokenizer.encode(PROMPT.format(source="Say it."))
    assert tokens.tolist() == [1, *expected, *tokenizer.encode("It."), 2]
    assert first == 1 + len(expected)
    tokens, first = data[1]
    assert (len(tokens), first, tokens[-1]) == (250, 200, 2)
    assert tokenizer.decode(tokens[:first].tolist()).endswith("x \n\n" + RESPONSE)
    tokens, first = data[2]
    assert tokens[:first].tolist() == [1, *tokenizer.encode(items[2]["input"])]  # not wrapped a second time
    assert SFTDataset(items, tokenizer, 200, 50, train_on_source=True)[0][1] == 1


def test_padding_of_simp_is_a_few_percent(tokenizer_dir, simp_file):
    splits = read_task(simp_file)[0]
    data = SFTDataset(splits["train"] + splits["test"], Tokenizer(tokenizer_dir), 1024, 256)
    for world_size in (1, 2):
        read = once = slots = 0
        for start in range(0, len(data) - 31, 32):
            samples = [data[index] for index in global_batch(42, len(data), start, start + 32)]
            batches = [batch for rank in range(world_size)
                       for batch in make_microbatches(samples, 4096, 32, rank, world_size)]
            read += count_tokens(samples)[0]
            once += (len(samples) - len(batches)) * len(batches[0][2])  # of the prefix
            slots += sum(len(prefix) + input_ids.numel() for input_ids, _, prefix in batches)
        assert 0 < 1 - (read - once) / slots < 0.07
        assert slots / read < 0.8


def test_token_shards_cover_the_text_once(tmp_path):
    np.save(tmp_path / "train-00000.npy", np.arange(0, 95, dtype=np.uint16))
    np.save(tmp_path / "train-00001.npy", np.arange(1000, 1041, dtype=np.uint16))
    data = ShardDataset(tmp_path, "train", 10)
    assert len(data) == 9 + 4
    targets = [token for index in range(len(data)) for token in data[index][0][data[index][1]:].tolist()]
    assert targets == [*range(1, 91), *range(1001, 1041)]
    assert all(len(data[index][0]) == 11 for index in range(len(data)))
    with pytest.raises(UserError, match="holds no token shards val"):
        ShardDataset(tmp_path, "val", 10)
    with pytest.raises(UserError, match="no train shard has the 201 tokens"):
        ShardDataset(tmp_path, "train", 200)


def test_prompts_are_cut_before_the_marker(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    short, long = encode_prompts(tokenizer, ["a", "b " * 500], 120)
    assert len(short) < 120 == len(long)
    assert tokenizer.decode(long).endswith(RESPONSE)


@pytest.mark.parametrize(("content", "said"), [
    ([], "no preprocessed task file"), ({"train": [], "eval": []}, "no preprocessed task file"),
    ({"train": [{"input": "x"}], "eval": [], "test": []}, r"train\[0\] is no object with the texts"),
    ({"train": [{"input": "x", "output": " "}], "eval": [], "test": []}, "holds no training samples")])
def test_bad_task_files(tmp_path, content, said):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_task(tmp_path / "t.json")


def test_a_row_longer_than_the_budget_stands_alone():
    assert plan_microbatches([900, 30, 20], 100, 32) == [0, 1, 3]
    assert collate([])[1].tolist() == [[IGNORE_INDEX]]
    assert torch.equal(*collate([(np.array([5, 5]), 1)]))
