"""Token shards: pretraining text as memory-mapped arrays of token ids. Writer and reader of the directory.

A directory holds train-*.npy, val-*.npy, the tokenizer's files and meta.json: {settings, documents, vocab_size,
shards: {file: {tokens, sha256}}}.
"""
import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.files import UserError, digest, first_line, parsing, read_json
from common.formatting import format_names
from common.provenance import require_same_settings
from common.writing import write_json
from corpus.documents import HELD_OUT_PER_MILLE, is_held_out
from model.tokenizer import Tokenizer

WINDOW_TOKENS = 256  # tokens of a window of evaluated or replayed text, unless the model's context is shorter
BATCH_DOCUMENTS = 50  # documents tokenized together: lists of ids take 100 bytes a token
SHARD_TOKENS = 1 << 27  # minimum size of every shard but the last
SHARD_NAME = re.compile(r"(train|val)-\d{5,}\.npy")
RESTORE = "Restore it, or remove the directory and make it again with data_prep.py text"


class ShardWriter:
    """Writes the token ids of one split to memory-mappable files."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.buffer: list[np.ndarray] = []
        self.shards: dict[str, dict[str, Any]] = {}  # file -> {tokens, sha256}

    def add(self, texts: list[str]) -> None:
        """Appends documents, each followed by eos."""
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            documents = self.tokenizer.encode_batch(texts[start:start + BATCH_DOCUMENTS])
            ids = chain.from_iterable([*document, self.tokenizer.eos_id] for document in documents)
            self.buffer.append(np.fromiter(ids, self.dtype))
        if sum(map(len, self.buffer)) >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered tokens as one shard, if there are any."""
        if num_tokens := sum(map(len, self.buffer)):
            path = self.folder / f"{self.split}-{len(self.shards):05}.npy"
            ids = np.concatenate(self.buffer)
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ids))
                file.write(ids.data)  # np.save would hide the reason for which a write fails
            self.shards[path.name] = {"tokens": num_tokens, "sha256": digest([path])}
            self.buffer = []


def shards_exist(directory: str | Path, settings: dict[str, Any]) -> bool:
    """Whether a directory holds shards made with these settings. Raises UserError if it holds others."""
    meta = Path(directory) / "meta.json"
    if not meta.exists():
        return False
    require_same_settings(directory, read_meta(directory)["settings"], settings)
    return True


def write_shards(folder: Path, documents: Iterable[str], tokenizer: Tokenizer, settings: dict[str, Any]) -> dict:
    """Writes the shards of both splits and meta.json into a folder; returns the content of meta.json."""
    if tokenizer.eos_id is None:
        raise UserError(f"{tokenizer.directory} names no end-of-text token, which has to separate the documents")
    writers = {split: ShardWriter(folder, split, tokenizer) for split in ("train", "val")}
    remaining, count = iter(documents), 0
    with tqdm(desc="writing tokens", unit="doc", disable=None) as progress:
        while batch := list(islice(remaining, 1000)):  # so that few documents are in memory at a time
            for split, writer in writers.items():
                writer.add([text for text in batch if is_held_out(text) == (split == "val")])
            count += len(batch)
            progress.update(len(batch))
    for writer in writers.values():
        writer.flush()
    if not all(writer.shards for writer in writers.values()):
        raise UserError(f"{settings['source']} holds {count} documents, too few to hold out {HELD_OUT_PER_MILLE} per "
                        "thousand")
    meta = {"settings": settings, "documents": count, "vocab_size": tokenizer.vocab_size,
            "shards": writers["train"].shards | writers["val"].shards}
    write_json(folder / "meta.json", meta)
    return meta


def read_meta(directory: str | Path) -> dict[str, Any]:
    """The content of meta.json. Raises UserError if it is damaged, or if the directory holds other shards."""
    path = Path(directory) / "meta.json"
    meta = read_json(path, dict)
    with parsing(path, "the description of token shards"):
        if not isinstance(meta["settings"], dict) or type(meta["vocab_size"]) is not int:
            raise TypeError("settings or vocab_size")
        for name, shard in meta["shards"].items():
            if not SHARD_NAME.fullmatch(name) or type(shard["tokens"]) is not int or type(shard["sha256"]) is not str:
                raise TypeError(f"shard {name!r}")
    present = {file.name for file in Path(directory).glob("*.npy")}
    for names, problem in ((meta["shards"].keys() - present, "lists shards that do not exist"),
                           (present - meta["shards"].keys(), "does not list the shards")):
        if names:
            raise UserError(f"{path} {problem}: {format_names(sorted(names))}. {RESTORE}")
    return meta


def open_shard(path: Path, tokens: int) -> np.ndarray:
    """A memory-mapped shard. Raises UserError if it is not an array of as many token ids as meta.json says."""
    try:
        shard = np.lib.format.open_memmap(path, mode="r")
    except PermissionError:
        raise
    except Exception as error:  # a damaged header may raise errors of the tokenize module, besides ValueError
        raise UserError(f"{path} is damaged or not a NumPy array ({first_line(error):.200}). {RESTORE}") from None
    if shard.dtype.kind != "u" or shard.shape != (tokens,):
        raise UserError(f"{path} holds {shard.dtype} numbers of shape {shard.shape}, but meta.json says {tokens} "
                        f"unsigned integers. {RESTORE}")
    return shard


def check_shards(directory: str | Path, rank: int = 0, world_size: int = 1, split: str = "") -> None:
    """Checks this rank's part of the shards of a split, or of both: their digests, and that all ids are in the
    vocabulary.

    Raises UserError for the first shard that differs from what meta.json says. Reads the shards once, from disk.
    """
    meta = read_meta(directory)
    if meta["vocab_size"] != (vocab_size := Tokenizer(directory).vocab_size):
        raise UserError(f"{directory}: meta.json says that the vocabulary has {meta['vocab_size']} tokens, but the "
                        f"tokenizer has {vocab_size}. {RESTORE}")
    names = sorted(name for name in meta["shards"] if name.startswith(split))[rank::world_size]
    for name in tqdm(names, "checking shards", unit="shard", disable=True if rank else None, delay=2):
        path, shard = Path(directory) / name, meta["shards"][name]
        ids = open_shard(path, shard["tokens"])
        if digest([path]) != shard["sha256"]:
            raise UserError(f"{path} is not the shard that meta.json describes: its SHA-256 differs. {RESTORE}")
        if (largest := int(ids.max())) >= vocab_size:
            raise UserError(f"{path} holds the token id {largest}, but the vocabulary has {vocab_size} tokens. "
                            f"{RESTORE}")


class ShardDataset:
    """One split ("train" or "val") of memory-mapped token shards, as at most `limit` samples (token ids, first target).

    A sample has `seq_length` + 1 tokens. Every token of a shard is a target once, but for the first and fewer than
    `seq_length` at its end. The headers of the shards are checked here, their content by `check_shards`.
    """

    def __init__(self, directory: str | Path, split: str, seq_length: int, limit: int | None = None):
        shards = read_meta(directory)["shards"]
        names = sorted(name for name in shards if name.startswith(f"{split}-"))
        if not names:
            raise UserError(f"{directory} holds no token shards {split}-*.npy: make them with data_prep.py text")
        self.shards = [open_shard(Path(directory) / name, shards[name]["tokens"]) for name in names]
        self.seq_length = seq_length
        self.ends = np.cumsum([max(0, len(shard) - 1) // seq_length for shard in self.shards])
        if not self.ends[-1]:
            most = max(map(len, self.shards))
            raise UserError(f"{directory}: the shards {split}-*.npy have at most {most:,} tokens, and a sample has "
                            f"{seq_length + 1:,}: make shards of a longer text, or lower the length of the samples")
        self.size = min(int(self.ends[-1]), limit or int(self.ends[-1]))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (self.ends[shard - 1] if shard else 0)) * self.seq_length
        return self.shards[shard][start:start + self.seq_length + 1].astype(np.int64), 1
