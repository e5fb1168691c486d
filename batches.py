"""What a step sees: samples, their order, and global batches cut into micro-batches.

A sample is a pair (tokens, first): an array of token ids, and the index of the first token that is a target. The
model reads tokens[:-1] and is asked for tokens[1:]; its length is the number of tokens that it reads. Fine-tuning
and pretraining differ in where their samples come from and in nothing else.
"""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from model.files import UserError, digest, read_json
from model.packing import common_prefix
from model.transformer import IGNORE_INDEX

# The Alpaca form (Taori et al., 2023). The marker also tells a source that is a whole prompt already.
RESPONSE = "### Response:"
PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
          "Write a response that appropriately completes the request.\n\n{source}\n\n" + RESPONSE)


class TaskData:
    """One split of a preprocessed task file, tokenized for fine-tuning.

    A sample is <bos> + the prompt, then the target + <eos>. Source and target are tokenized apart and cut to
    `max_source_length` and `max_target_length` tokens; the loss falls on the target, with `train_on_source` on all.
    """

    def __init__(self, items, tokenizer, max_source_length, max_target_length, train_on_source=False):
        sources = encode_prompts(tokenizer, [item["input"] for item in items], max_source_length)
        targets = tokenizer.encode_batch([item["output"] for item in items])
        self.samples = [
            (np.array(source + target[:max_target_length - 1] + [tokenizer.eos_id], dtype=np.int64),
             1 if train_on_source else len(source)) for source, target in zip(sources, targets)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def encode_prompts(tokenizer, sources, max_length):
    """Token ids of <bos> + prompt for each source text, at most `max_length` of them.

    A prompt that is too long loses the end of its source and keeps the response marker, without which the model
    would be asked to go on with the source.
    """
    prompts = [source if source.rstrip().endswith(RESPONSE) else PROMPT.format(source=source) for source in sources]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    marker = tokenizer.encode("\n\n" + RESPONSE)
    encoded = [bos + ids for ids in tokenizer.encode_batch(prompts)]
    return [ids if len(ids) <= max_length else ids[:max_length - len(marker)] + marker for ids in encoded]


class TokenShards:
    """One split ("train" or "val") of a directory of token shards, as samples of `seq_length` tokens.

    Every token but the first of the text is a target once. The shards stay on disk, memory-mapped. `limit` is the
    most samples that are used.
    """

    def __init__(self, directory, split, seq_length, limit=None):
        paths = sorted(Path(directory).glob(f"{split}-*.npy"))
        if not paths:
            raise UserError(f"{directory} holds no token shards {split}-*.npy: make them with data_prep.py text")
        self.shards, self.seq_length = [np.load(path, mmap_mode="r") for path in paths], seq_length
        self.ends = np.cumsum([max(0, len(shard) - 1) // seq_length for shard in self.shards])
        if not self.ends[-1]:
            raise UserError(f"{directory}: no {split} shard has the {seq_length + 1} tokens of one sample")
        self.size = min(int(self.ends[-1]), limit or int(self.ends[-1]))

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        shard = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (self.ends[shard - 1] if shard else 0)) * self.seq_length
        return self.shards[shard][start:start + self.seq_length + 1].astype(np.int64), 1


def read_task(path):
    """The splits {"train", "eval", "test"} of a preprocessed task file, items without a target left out.

    Also returns what was left out, as a list of names such as "train[3]". Raises UserError for a file that is not in
    the format.
    """
    splits = read_json(path)
    names = ("train", "eval", "test")
    if not isinstance(splits, dict) or not all(isinstance(splits.get(name), list) for name in names):
        raise UserError(f"{path} is no preprocessed task file: expected an object with the lists train, eval and test")
    dropped = []
    for name in names:
        for index, item in enumerate(splits[name]):
            if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("input", "output")):
                raise UserError(f"{path}: {name}[{index}] is no object with the texts 'input' and 'output'")
        dropped += [f"{name}[{index}]" for index, item in enumerate(splits[name]) if not item["output"].strip()]
        splits[name] = [item for item in splits[name] if item["output"].strip()]
    if not splits["train"]:
        raise UserError(f"{path} holds no training samples")
    return splits, dropped


def data_digest(path):
    """SHA-256 of a task file, or of a shard directory's meta.json, which holds the digests of the shards."""
    meta = Path(path) / "meta.json"
    if not Path(path).is_file() and not meta.is_file():
        raise UserError(f"{path} does not exist or is not a directory of token shards with a meta.json: make it with "
                        "data_prep.py text")
    return digest([path if Path(path).is_file() else meta])


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The order of the samples in one epoch: a function of these three numbers alone."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def global_batch(seed, size, start, stop):
    """Indices of the samples at the places start ≤ i < stop of the endless stream of shuffled epochs."""
    return [int(epoch_order(seed, place // size, size)[place % size]) for place in range(start, stop)]


def cut(lengths, budget, step_slots):
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


def micro_batches(samples, budget, step_slots, rank=0, world_size=1):
    """Cuts a global batch, and returns this rank's micro-batches: (input_ids, targets) [B, T] and the prefix [P] that
    stands before each row of all of them, the beginning that the prompts of the global batch have in common.

    The samples are sorted by length and dealt out in turn, so every rank has nearly the same lengths; all are cut at
    the same places, those that suit rank 0, and so run the same number of micro-steps. A rank with no sample left
    gets a row without a target.
    """
    samples = sorted(samples, key=lambda sample: -len(sample[0]))
    prefix = shared_prefix(samples)
    shared = len(prefix)
    cuts = cut([len(tokens) - 1 - shared for tokens, _ in samples[::world_size]], budget - shared, step_slots + shared)
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
