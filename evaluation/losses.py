"""Losses on held-out text and on the references of tasks, and the KL divergence from a reference checkpoint.

All are kept by item, so that two checkpoints can be compared item by item.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.files import UserError
from common.provenance import data_digest, git_commit
from corpus.documents import TEXT_SUFFIXES, read_documents
from corpus.shards import WINDOW_TOKENS, ShardDataset, check_shards
from corpus.tasks import SFTDataset
from evaluation.evaluate_config import EvaluateConfig
from evaluation.parallel import ParallelModel
from evaluation.result_files import earlier_results, is_same_run, losses_file, read_losses_file, write_losses
from evaluation.test_sets import TaskTestSet, recorded_template
from model.checkpoint import Checkpoint, checkpoint_digest, open_checkpoint
from model.hub import fetch_checkpoint
from model.token_losses import Sample
from model.tokenizer import Tokenizer, same_tokenizer


@dataclass(frozen=True)
class LossSet:
    """Items whose losses are measured: windows or documents of a text, or the references of a task's test set."""
    name: str  # of the task, or "text"
    kind: str  # "text" or "task"
    samples: Sequence[Sample]
    items: Sequence[int]  # the item that each sample is a part of
    num_bytes: Sequence[int]  # UTF-8 bytes of the targets of each item
    settings: dict[str, Any]  # what the losses depend on besides the model


def open_loss_sets(cfg: EvaluateConfig, checkpoint: Checkpoint, test_sets: Sequence[TaskTestSet]) -> list[LossSet]:
    """The held-out text and the references of the test sets. Raises UserError if one does not fit the checkpoint."""
    facts = {"reference_digest": reference_digest(cfg.reference, checkpoint) if cfg.reference else None}
    found = [open_text(cfg, checkpoint, facts)] if cfg.text else []
    found += [task_references(test_set, checkpoint.tokenizer, cfg.max_target_length, facts) for test_set in test_sets]
    for loss_set in found:
        if not sum(loss_set.num_bytes):
            raise UserError(f"the targets of the {loss_set.kind} {loss_set.name!r} hold no text, so bits per byte are "
                            "not defined: raise --limit, --text_length or --max_target_length")
    return found


def reference_digest(reference: str, checkpoint: Checkpoint) -> str:
    """The digest of the reference checkpoint. Raises UserError if its predictions cannot be compared."""
    opened = open_checkpoint(fetch_checkpoint(reference))
    own, other = checkpoint.config, opened.config
    if own.vocab_size != other.vocab_size or not same_tokenizer(checkpoint.directory, opened.directory):
        raise UserError(f"the reference {reference} has another vocabulary or tokenizer than {checkpoint.directory}: "
                        "KL is defined between models with the same tokens, such as a stage and its m0")
    if other.max_position_embeddings < own.max_position_embeddings:
        raise UserError(f"the reference {reference} has a context of {other.max_position_embeddings} tokens, less than "
                        f"the {own.max_position_embeddings} of {checkpoint.directory}")
    return checkpoint_digest(opened.directory)


def open_text(cfg: EvaluateConfig, checkpoint: Checkpoint, facts: dict[str, Any]) -> LossSet:
    """The held-out text: windows of token shards, or the documents of a text file."""
    path, context = Path(cfg.text or ""), checkpoint.config.max_position_embeddings
    if path.is_file() and path.suffix not in TEXT_SUFFIXES:
        raise UserError(f"{path} is neither a directory of token shards nor a .txt or .jsonl file")
    seq_length = cfg.text_length or (context if path.is_file() else min(WINDOW_TOKENS, context))
    if seq_length > context:
        raise UserError(f"text_length is {seq_length}, more than the model's max_position_embeddings {context}: lower "
                        "it")
    settings = facts | {"data_digest": data_digest(path), "seq_length": seq_length, "text_tokens": cfg.text_tokens}
    if path.is_file():
        return text_documents(cfg, checkpoint.tokenizer, settings)
    if not same_tokenizer(checkpoint.directory, path):
        raise UserError(f"{path} was made with a tokenizer other than that of {cfg.checkpoint}: make it again with "
                        f"data_prep.py text --tokenizer {cfg.checkpoint}, or give a text file")
    return shard_windows(path, checkpoint.tokenizer, cfg.limit, settings)


def shard_windows(directory: Path, tokenizer: Tokenizer, limit: int | None, settings: dict[str, Any]) -> LossSet:
    """The first windows of the held-out split of token shards; each is an item.

    The bytes of a window are those of its decoded targets. Special tokens count nothing. Of a character that the edge
    of a window cuts, each side may count up to a few bytes more or less.
    """
    check_shards(directory, split="val")
    seq_length, most = settings["seq_length"], settings["text_tokens"]
    if most < seq_length:
        raise UserError(f"text_tokens is {most}, less than a window of {seq_length} tokens: raise it, or lower "
                        "text_length")
    count = min(most // seq_length, limit or most)
    dataset = ShardDataset(directory, "val", seq_length, count)
    samples = [dataset[index] for index in range(len(dataset))]
    num_bytes = [max(0, decoded_bytes(tokenizer, ids) - decoded_bytes(tokenizer, ids[:first]))
                 for ids, first in samples]
    return LossSet("text", "text", samples, range(len(samples)), num_bytes, settings)


def decoded_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """The number of UTF-8 bytes of the text of token ids."""
    return len(tokenizer.decode(ids.tolist()).encode())


def text_documents(cfg: EvaluateConfig, tokenizer: Tokenizer, settings: dict[str, Any]) -> LossSet:
    """The first documents of a text file; each is an item, however many windows it takes. If the first one has more
    tokens than the limit, its beginning is the only item.

    All tokens of a document are targets once. Its first token follows bos if the tokenizer adds it, otherwise the
    end-of-text token, as in pretraining.
    """
    assert tokenizer.eos_id is not None  # the checkpoint was opened with require_eos
    start = tokenizer.bos_id if tokenizer.adds_bos and tokenizer.bos_id is not None else tokenizer.eos_id
    samples: list[Sample] = []
    items: list[int] = []
    num_bytes: list[int] = []
    tokens, seq_length = 0, settings["seq_length"]
    for text in islice(read_documents(str(cfg.text)), cfg.limit):
        ids = np.array([start, *tokenizer.encode(text)], dtype=np.int64)
        tokens += len(ids) - 1
        if tokens > cfg.text_tokens:
            if num_bytes:
                break
            ids = ids[:cfg.text_tokens + 1]
            text = tokenizer.decode(ids[1:].tolist())
        windows = [(ids[at:at + seq_length + 1], 1) for at in range(0, len(ids) - 1, seq_length)]
        samples += windows
        items += [len(num_bytes)] * len(windows)
        num_bytes += [len(text.encode())] if windows else []
    if not samples:
        raise UserError(f"{cfg.text} holds no document with text")
    return LossSet("text", "text", samples, items, num_bytes, settings)


def task_references(test_set: TaskTestSet, tokenizer: Tokenizer, max_target_length: int,
                    facts: dict[str, Any]) -> LossSet:
    """The references of a test set after their prompts, tokenized as in fine-tuning: the target and <eos>."""
    samples = SFTDataset(test_set.items, tokenizer, test_set.max_source_length, max_target_length,
                         template=test_set.template)
    num_bytes = [decoded_bytes(tokenizer, ids[first:]) for ids, first in samples]
    return LossSet(test_set.task, "task", samples, range(len(samples)), num_bytes, facts | {
        "data_digest": test_set.data_digest, "max_source_length": test_set.max_source_length,
        "max_target_length": max_target_length, "template": recorded_template(test_set.template)})


def existing_losses(loss_set: LossSet, out: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The content of the losses file in `out` if it is of the same run, else None.

    Losses with a KL divergence also serve a run without a reference. Raises UserError if the file is damaged, or if
    more items, another text or a KL divergence would be lost.
    """
    path = losses_file(out, loss_set.name, loss_set.kind)
    if not path.exists():
        return None
    with earlier_results():
        existing = read_losses_file(path)
        if existing["samples"] > len(loss_set.num_bytes):
            raise UserError(f"{path} has results of {existing['samples']} items, which would be replaced by those of "
                            f"{len(loss_set.num_bytes)}")
    recorded = existing["run"] if loss_set.settings["reference_digest"] else existing["run"] | {
        "reference_digest": None}
    if is_same_run(recorded, run | loss_set.settings):
        return existing
    if loss_set.kind == "text" and existing["run"].get("data_digest") != loss_set.settings["data_digest"]:
        raise UserError(f"{path} has the losses of another text, which would be replaced: choose another --out, or "
                        "remove it")
    if existing["kl"] is not None and not loss_set.settings["reference_digest"]:
        raise UserError(f"{path} has a KL divergence, which would be lost: give --reference, or choose another --out")
    return None


def evaluate_losses(loss_set: LossSet, model: ParallelModel, out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Measures the losses of all items and writes them to `out`, unless losses of the same run exist.

    Returns the content of the losses file.
    """
    if existing := existing_losses(loss_set, out, run):
        path = losses_file(out, loss_set.name, loss_set.kind)
        print(f"{path} already exists, with the same model, data and settings", flush=True)
        return existing

    def by_item(values: Sequence[float]) -> list[float]:
        return np.bincount(loss_set.items, values).tolist()

    losses = model.losses(loss_set.samples)
    items = {"nll": by_item([nll for nll, _ in losses]),
             "tokens": [int(count) for count in by_item([len(ids) - first for ids, first in loss_set.samples])],
             "bytes": list(loss_set.num_bytes),
             "kl": by_item([kl for _, kl in losses]) if loss_set.settings["reference_digest"] else None}
    return write_losses(out, loss_set.name, loss_set.kind, items, run | loss_set.settings | {"commit": git_commit()})
