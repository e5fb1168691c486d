"""Task files: raw and preprocessed, and prompts. A task is fine-tuned on as an SFTDataset."""
import re
import sys

import numpy as np

from common.files import UserError, read_json

# The Alpaca form (Taori et al., 2023). The marker also tells a source that is a whole prompt already.
RESPONSE = "### Response:"

PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
          "Write a response that appropriately completes the request.\n\n{source}\n\n" + RESPONSE)

SPLIT_SEED = 42

BRACKETS = {"lrb": "(", "rrb": ")", "lsb": "[", "rsb": "]"}  # Penn Treebank's names, in either case


class SFTDataset:
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


def clean(text):
    """A text with its brackets back in place of -LRB-, -RRB-, -LSB-, -RSB-, and no white space around it."""
    return re.sub("-([lr][rs]b)-", lambda match: BRACKETS[match[1].lower()], text, flags=re.IGNORECASE).strip()


def read_raw_files(folder, word):
    """The items of all raw files in a folder with `word` ("train" or "test") in their names, in the files' order.

    An item without a target is left out; how many, and which, is printed.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if role(path) == word]
    if not paths:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(f"{folder} holds no {word} file: expected a *.json with {word!r} in its name; found {found}")
    items, empty = [], []
    for path in paths:
        raw = read_json(path)
        lists = {key: raw.get(key) if isinstance(raw, dict) else None for key in ("src", "tgt", "src_info")}
        if missing := [key for key, value in lists.items() if not isinstance(value, list)]:
            raise UserError(f"{path} lacks the list {', '.join(missing)}: expected one object with the lists src, tgt "
                            "and src_info")
        lengths = {key: len(value) for key, value in lists.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{path}: the lists differ in length: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))
        for number, (source, target, info) in enumerate(zip(*lists.values())):
            targets = [text or "" for text in (target if isinstance(target, list) else [target])]  # null is empty
            if not isinstance(info, dict) or not all(isinstance(text, str) for text in (source, *targets)):
                raise UserError(f"{path}: item {number}: expected a text as src, a text or a list of texts as tgt, and "
                                "an object as src_info")
            references = [clean(text) for text in targets]
            if not references or not references[0]:
                empty.append(f"{path.name}[{number}]")
                continue
            item = {"input": clean(source), "output": references[0], "src_info": info, "index": len(items) + len(empty)}
            items.append(item | ({"references": references} if len(references) > 1 else {}))
    if empty:
        more = f" and {len(empty) - 20} more" if len(empty) > 20 else ""
        print(f"{folder}: {len(empty)} {word} items have an empty target and are left out: "
              f"{', '.join(empty[:20])}{more}", file=sys.stderr)
    if not items:
        raise UserError(f"{folder}: its {word} files hold no item with a target")
    return items


def role(path):
    """"train", "test" or None: which of the words is in a raw file's name, after the prompt's name if it can be told.

    The prompt's name comes first and may hold either word itself: constrain_start+make_a_title.test.json is a test.
    """
    for part in (path.name.partition(".")[2], path.name):
        found = [word for word in ("train", "test") if word in part]
        if len(found) == 2:
            raise UserError(f"{path} has both train and test in its name: rename it")
        if found:
            return found[0]
    return None


def split_indices(count, size, seed=SPLIT_SEED):
    """(training, evaluation) indices, as `train_test_split(test_size=size, shuffle=True, seed=seed)` of Hugging
    Face's datasets gives them; size is a share below 1, or a number of samples."""
    held_out = int(np.ceil(size * count)) if size < 1 else int(size)
    if held_out >= count:
        raise UserError(f"eval_dataset_size takes {held_out} of {count} training items: lower it")
    order = np.random.default_rng(seed).permutation(count).tolist()
    return order[held_out:], order[:held_out]
