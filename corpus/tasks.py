"""Preprocessed task files (writer and reader), the prompt, and a task as samples for supervised fine-tuning."""
import json
from pathlib import Path
from typing import Any

import numpy as np

from common.files import UserError, read_json, write_text
from model.tokenizer import Tokenizer

# The Alpaca prompt (Taori et al., 2023). A source that already ends with the marker is used as the whole prompt.
RESPONSE = "### Response:"

PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
          "Write a response that appropriately completes the request.\n\n{source}\n\n" + RESPONSE)

SPLITS = ("train", "eval", "test")
SPLIT_SEED = 42


class SFTDataset(list):
    """Items of a preprocessed task file, tokenized for supervised fine-tuning: a list of samples.

    A sample is (token ids, index of the first target). The ids are <bos> + prompt, then target + <eos>. Source and
    target are tokenized separately and truncated to `max_source_length` and `max_target_length` tokens. The loss covers
    the target, and the prompt as well if `train_on_source`.
    """

    def __init__(self, items: list[dict], tokenizer: Tokenizer, max_source_length: int, max_target_length: int,
                 train_on_source: bool = False):
        sources = encode_prompts(tokenizer, [item["input"] for item in items], max_source_length)
        targets = tokenizer.encode_batch([item["output"] for item in items])
        super().__init__(
            (np.array(source + target[:max_target_length - 1] + [tokenizer.eos_id], dtype=np.int64),
             1 if train_on_source else len(source)) for source, target in zip(sources, targets))


def encode_prompts(tokenizer: Tokenizer, sources: list[str], max_length: int) -> list[list[int]]:
    """Token ids of <bos> + prompt for each source text, at most `max_length` of them.

    A long prompt loses the end of its source but keeps the response marker; without the marker the model would
    continue the source.
    """
    prompts = [source if source.rstrip().endswith(RESPONSE) else PROMPT.format(source=source) for source in sources]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    marker = tokenizer.encode("\n\n" + RESPONSE)
    encoded = [bos + ids for ids in tokenizer.encode_batch(prompts)]
    return [ids if len(ids) <= max_length else ids[:max_length - len(marker)] + marker for ids in encoded]


def split_indices(count: int, eval_size: float) -> tuple[list[int], list[int]]:
    """(training, evaluation) indices, equal to those of `train_test_split(eval_size, shuffle=True, seed=SPLIT_SEED)` in
    Hugging Face datasets. `eval_size` is a share below 1, or a number of samples."""
    num_eval = int(np.ceil(eval_size * count)) if eval_size < 1 else int(eval_size)
    if num_eval >= count:
        raise UserError(f"eval_dataset_size takes {num_eval} of {count} training items: lower it")
    order = np.random.default_rng(SPLIT_SEED).permutation(count).tolist()
    return order[num_eval:], order[:num_eval]


def write_task(path: str | Path, splits: dict[str, list[dict]]) -> bool:
    """Writes {"train", "eval", "test"} as a preprocessed task file; returns whether the file has changed."""
    text = json.dumps(splits, ensure_ascii=False, indent=1) + "\n"
    if Path(path).exists() and Path(path).read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def read_task(path: str | Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The splits {"train", "eval", "test"} of a preprocessed task file, and the names of skipped items ("train[3]").

    Items without a target are skipped. Raises UserError if the file does not have the format.
    """
    splits = read_json(path)
    if not isinstance(splits, dict) or not all(isinstance(splits.get(name), list) for name in SPLITS):
        raise UserError(f"{path} is not a preprocessed task file: expected an object with the lists "
                        + ", ".join(SPLITS))
    skipped = []
    for name in SPLITS:
        for index, item in enumerate(splits[name]):
            if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("input", "output")):
                raise UserError(f"{path}: {name}[{index}] is not an object with the texts 'input' and 'output'")
        skipped += [f"{name}[{index}]" for index, item in enumerate(splits[name]) if not item["output"].strip()]
        splits[name] = [item for item in splits[name] if item["output"].strip()]
    if not splits["train"]:
        raise UserError(f"{path} holds no training samples")
    return splits, skipped
