"""Token shards: the text of pretraining as memory-mapped arrays of token ids. Writer and reader."""
from itertools import chain
from pathlib import Path

import numpy as np

from common.files import UserError, digest

SHARD_TOKENS = 1 << 27


class ShardWriter:
    """Writes the token ids of one split as memory-mappable arrays of at least SHARD_TOKENS each, but the last."""

    def __init__(self, folder, split, tokenizer):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.buffer, self.held, self.shards = [], 0, {}

    def add(self, texts):
        """Appends documents, each followed by eos."""
        ids = [[*ids, self.tokenizer.eos_id] for ids in self.tokenizer.encode_batch(texts)]
        self.buffer.append(np.fromiter(chain.from_iterable(ids), self.dtype))
        self.held += len(self.buffer[-1])
        if self.held >= SHARD_TOKENS:
            self.flush()

    def flush(self):
        path = self.folder / f"{self.split}-{len(self.shards):05}.npy"
        np.save(path, np.concatenate(self.buffer))
        self.shards[path.name] = {"tokens": self.held, "sha256": digest([path])}
        self.buffer, self.held = [], 0

    def close(self):
        """Writes what is left; returns {file: {tokens, sha256}}."""
        if self.held:
            self.flush()
        return self.shards


class ShardDataset:
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
