"""Token shards: pretraining text as memory-mapped arrays of token ids. Writer and reader of the directory.

A directory holds train-*.npy, val-*.npy, the tokenizer's files and meta.json: {settings, documents, vocab_size,
shards: {file: {tokens, sha256}}}.
"""
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.files import UserError, digest, read_json, write_json
from common.provenance import changed
from corpus.documents import VALIDATION_PER_MILLE, is_held_out
from model.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27  # minimum size of every shard but the last


class ShardWriter:
    """Writes the token ids of one split to memory-mappable files."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.buffer: list[np.ndarray] = []
        self.shards: dict[str, dict[str, Any]] = {}  # file -> {tokens, sha256}

    def add(self, texts: list[str]) -> None:
        """Appends documents, each followed by eos."""
        ids = [[*ids, self.tokenizer.eos_id] for ids in self.tokenizer.encode_batch(texts)]
        self.buffer.append(np.fromiter(chain.from_iterable(ids), self.dtype))
        if sum(map(len, self.buffer)) >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered tokens as one shard, if there are any."""
        if num_tokens := sum(map(len, self.buffer)):
            path = self.folder / f"{self.split}-{len(self.shards):05}.npy"
            np.save(path, np.concatenate(self.buffer))
            self.shards[path.name] = {"tokens": num_tokens, "sha256": digest([path])}
            self.buffer = []


def shards_exist(directory: str | Path, settings: dict[str, Any]) -> bool:
    """Whether a directory holds shards made with these settings. Raises UserError if it holds others."""
    meta = Path(directory) / "meta.json"
    if not meta.exists():
        return False
    if differences := changed(read_json(meta).get("settings", {}), settings):
        raise UserError(f"{directory} was made with other settings: {'; '.join(differences)}. Remove it, or choose "
                        "another --output_path")
    return True


def write_shards(folder: Path, documents: Iterable[str], tokenizer: Tokenizer, settings: dict[str, Any]) -> dict:
    """Writes the shards of both splits and meta.json into a folder; returns the content of meta.json."""
    if tokenizer.eos_id is None:
        raise UserError(f"{tokenizer.directory} names no end-of-text token, which has to separate the documents")
    writers = {split: ShardWriter(folder, split, tokenizer) for split in ("train", "val")}
    remaining, count = iter(documents), 0
    with tqdm(desc="writing tokens", unit="doc", disable=None) as progress:
        while batch := list(islice(remaining, 1000)):  # a text of any length fits in memory
            for split, writer in writers.items():
                writer.add([text for text in batch if is_held_out(text) == (split == "val")])
            count += len(batch)
            progress.update(len(batch))
    for writer in writers.values():
        writer.flush()
    if not all(writer.shards for writer in writers.values()):
        raise UserError(f"{settings['source']} holds {count} documents, too few to hold out {VALIDATION_PER_MILLE} per "
                        "thousand for validation")
    meta = {"settings": settings, "documents": count, "vocab_size": tokenizer.vocab_size,
            "shards": writers["train"].shards | writers["val"].shards}
    write_json(folder / "meta.json", meta)
    return meta


class ShardDataset:
    """One split ("train" or "val") of memory-mapped token shards, as at most `limit` samples (token ids, first target).

    A sample has `seq_length` + 1 tokens. Every token of a shard but the first is a target once.
    """

    def __init__(self, directory: str | Path, split: str, seq_length: int, limit: int | None = None):
        paths = sorted(Path(directory).glob(f"{split}-*.npy"))
        if not paths:
            raise UserError(f"{directory} holds no token shards {split}-*.npy: make them with data_prep.py text")
        self.shards, self.seq_length = [np.load(path, mmap_mode="r") for path in paths], seq_length
        self.ends = np.cumsum([max(0, len(shard) - 1) // seq_length for shard in self.shards])
        if not self.ends[-1]:
            raise UserError(f"{directory}: no {split} shard has the {seq_length + 1} tokens of one sample")
        self.size = min(int(self.ends[-1]), limit or int(self.ends[-1]))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (self.ends[shard - 1] if shard else 0)) * self.seq_length
        return self.shards[shard][start:start + self.seq_length + 1].astype(np.int64), 1
