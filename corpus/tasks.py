"""Preprocessed task files (writer and reader), and a task as samples for supervised fine-tuning."""
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import UserError, read_json
from common.provenance import DEFAULT_TEMPLATE, TemplateName
from common.writing import write_text
from corpus.prompts import open_template
from model.tokenizer import Tokenizer

SPLITS = ("train", "eval", "test")
BEGINNING = b'{\n "train": ['  # of a file that write_task has written
SPLIT_SEED = 42


class SFTDataset(list):
    """Items of a preprocessed task file, tokenized for supervised fine-tuning: a list of samples.

    A sample is (token ids, index of the first target). The ids are <bos> + prompt, then target + <eos>. Source and
    target are tokenized separately and truncated to `max_source_length` and `max_target_length` tokens. A target
    that does not fit with its <eos> has none, so that the model does not learn to end in the middle of a word. The loss
    covers the target, and the prompt as well if `train_on_source`. A chat template has its own tokens instead of <bos>
    and <eos>, see corpus/prompts.py. `long_prompts` is the number of prompts of `max_source_length` tokens, to which
    longer ones are cut, and `cut_targets` that of targets that are cut.
    """

    def __init__(self, items: list[dict], tokenizer: Tokenizer, max_source_length: int, max_target_length: int,
                 train_on_source: bool = False, template: TemplateName = DEFAULT_TEMPLATE):
        opened = open_template(template, tokenizer)
        sources, targets = opened.encode_samples([item["input"] for item in items], [item["output"] for item in items],
                                                 max_source_length)
        self.long_prompts = sum(len(source) == max_source_length for source in sources)
        self.cut_targets = sum(len(target) >= max_target_length for target in targets)
        super().__init__(
            (np.array(source + [*target, opened.end_id][:max_target_length], dtype=np.int64),
             1 if train_on_source else len(source)) for source, target in zip(sources, targets))


def split_indices(count: int, eval_size: float) -> tuple[list[int], list[int]]:
    """(training, evaluation) indices, equal to those of `train_test_split(eval_size, shuffle=True, seed=SPLIT_SEED)` in
    Hugging Face datasets. `eval_size` is a share below 1, or a number of samples."""
    num_eval = int(np.ceil(eval_size * count)) if eval_size < 1 else int(eval_size)
    if num_eval >= count:
        raise UserError(f"eval_dataset_size takes {num_eval} of {count} training items: lower it")
    order = np.random.default_rng(SPLIT_SEED).permutation(count).tolist()
    return order[num_eval:], order[:num_eval]


def write_task(path: str | Path, splits: dict[str, list[dict]]) -> bool:
    """Writes {"train", "eval", "test"} as a preprocessed task file; returns whether the file is new.

    Raises UserError if the path holds anything else, since models may have been trained on it.
    """
    text = json.dumps(splits, ensure_ascii=False, indent=1) + "\n"
    if Path(path).is_file():
        if (old := Path(path).read_bytes()) == text.encode():
            return False
        if old.startswith(BEGINNING):
            raise UserError(f"{path} exists already, and these raw files and eval_dataset_size give another one: "
                            "remove it to prepare the task again, or choose another name")
        raise UserError(f"{path} exists already and is not a preprocessed task file: remove it or choose another name")
    write_text(path, text)
    return True


def read_task(path: str | Path,
              source_field: str | None = None) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The splits {"train", "eval", "test"} of a preprocessed task file, and the names of skipped items ("train[3]").

    Items without a target are skipped. A missing `src_info`, or null, becomes an empty object. Raises UserError if the
    file does not have the format. `source_field` is the field of src_info with the source text, for the metrics; it is
    checked as well.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in SPLITS):
        raise UserError(f"{path} is not a preprocessed task file: expected an object with the lists "
                        + ", ".join(SPLITS))
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    skipped = []
    for name in SPLITS:
        for index, item in enumerate(content[name]):
            if problem := item_problem(item, source_field):
                raise UserError(f"{path}: {name}[{index}] is not {problem}")
            if item["output"].strip():
                splits[name].append(item | {"src_info": item.get("src_info") or {}})
            else:
                skipped.append(f"{name}[{index}]")
    if not splits["train"]:
        raise UserError(f"{path} holds no training samples")
    return splits, skipped


def first_items(items: list[dict], limit: int | None) -> list[dict]:
    """Returns the first `limit` items of a test set, taken from its prompts in turn; all without a limit. A raw folder
    has the items of one prompt after those of another, so the first ones in its order would have a single prompt."""
    if limit is None:
        return items
    items_by_prompt: dict[Any, list[dict]] = {}
    for item in items:
        items_by_prompt.setdefault(str((item["src_info"] or {}).get("prompt_name")), []).append(item)
    in_turn = (item for turn in itertools.zip_longest(*items_by_prompt.values()) for item in turn if item is not None)
    return list(itertools.islice(in_turn, limit))


def lacking_source(items: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    """A list with the sentence on the first item whose src_info has no text in a field; empty if all have one. SARI
    compares the output with this text."""
    return [f"the test item {item['input']!r:.60} has no text as {field!r} in src_info, which SARI needs; it has "
            f"{', '.join(item['src_info']) or 'no fields'}: `source` in the task's file names the field"
            for item in items if not item["src_info"].get(field)][:1]


def item_problem(item: Any, source_field: str | None) -> str:
    """The requirement that an item of a preprocessed task file violates, as words after "is not"; empty if it is valid.
    """
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("input", "output")):
        return "an object with the texts 'input' and 'output'"
    references, info = item.get("references", ["one"]), item.get("src_info")
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        return "an item whose 'references' are a list of one or more texts"
    if not isinstance(info, dict | None):
        return "an item whose 'src_info' is an object"
    if info and not isinstance(info.get(source_field), str | None):
        return f"an item whose 'src_info' has a text as {source_field!r}"
    return ""
