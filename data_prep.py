"""Prepares data: task files for fine-tuning, token shards for pretraining, raw task folders from the Hub, benchmarks.

    python data_prep.py task --task simp --folder_path data/raw --output_path data/prepared/raw/simp.json
    python data_prep.py text --source docs --size tiny --output_path data/text/tiny
    python data_prep.py hub --task simp --output_path data/raw
    python data_prep.py suite --output_path data/eval/sample
"""
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from documents import VALIDATION_PER_MILLE, held_out, load_hub_dataset, read_documents
from model.files import UserError, digest, new_directory, read_json, read_json_lines, write_json, write_text
from model.tokenizer import Tokenizer, copy_tokenizer
from sample_suite import build_suite
from settings import ROOT, read_config, run, setting, unknown_name

SPLIT_SEED = 42
SHARD_TOKENS = 1 << 27
TOKENIZER_DOCUMENTS = 1_000_000  # a vocabulary is trained on the first of them
BRACKETS = {"lrb": "(", "rrb": ")", "lsb": "[", "rsb": "]"}  # Penn Treebank's names, in either case


# ---------------------------------------------------------------------------- raw task files to one preprocessed file

@dataclass(frozen=True)
class TaskSettings:
    """Settings of `data_prep.py task`."""
    task: str | None = setting(None, "task (a file in configs/task)")
    folder_path: str | None = setting(None, "folder of the task's raw files, or the folder that holds that folder")
    output_path: str | None = setting(None, "preprocessed file to write")
    eval_dataset_size: float = setting(0.1, "evaluation split: a share of the training data, or a number of samples")

    def problems(self):
        found = [f"--{name} is missing" for name in ("task", "folder_path", "output_path") if not getattr(self, name)]
        found += unknown_name("task", self.task) if self.task else []
        size = self.eval_dataset_size
        if not 0 < size < math.inf or (size >= 1 and size != int(size)):
            found.append(f"eval_dataset_size is {size}, expected a share below 1 or a whole number of samples")
        return found


def prepare_task(s):
    """Writes one JSON object with the lists train, eval and test of {input, output, src_info, index}."""
    spec = read_config("task", s.task)
    folder = Path(s.folder_path)
    folder = folder / spec["folder"] if (folder / spec["folder"]).is_dir() else folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected the raw files of {s.task}, or a folder {spec['folder']} with "
                        "them")
    train, test = (read_raw_files(folder, word) for word in ("train", "test"))
    if "test_prompt" in spec:
        prompts = sorted({str(item["src_info"].get("prompt_name")) for item in test})
        test = [item for item in test if item["src_info"].get("prompt_name") == spec["test_prompt"]]
        if not test:
            raise UserError(f"{folder}: no test item has prompt_name {spec['test_prompt']!r}; found "
                            + ", ".join(prompts))
    train_indices, eval_indices = split_indices(len(train), s.eval_dataset_size)
    splits = {"train": [train[i] for i in train_indices], "eval": [train[i] for i in eval_indices], "test": test}
    text = json.dumps(splits, ensure_ascii=False, indent=1) + "\n"
    counts = ", ".join(f"{len(items):,} {name}" for name, items in splits.items())
    path = Path(s.output_path)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return print(f"{path}: {counts} (unchanged)")
    write_text(path, text)
    print(f"{path}: {counts}")


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


# ------------------------------------------------------------------------------------------- raw text to token shards

@dataclass(frozen=True)
class TextSettings:
    """Settings of `data_prep.py text`."""
    source: str = setting("docs", "docs (the installed packages' documentation), a .txt or .jsonl file, a folder of "
                                  "them, or a Hub dataset's name")
    output_path: str | None = setting(None, "directory to make")
    size: str | None = setting(None, "size preset whose vocabulary the tokenizer gets")
    vocab_size: int = setting(4096, "vocabulary of the tokenizer, where no size is given")
    tokenizer: str | None = setting(None, "checkpoint directory whose tokenizer to use; none: train one on the text")
    text_column: str = setting("text", "field of a .jsonl line or column of a Hub dataset that holds the text")
    dataset_config: str | None = setting(None, "configuration of a Hub dataset, such as en")
    max_documents: int | None = setting(None, "read only the first N documents")

    def problems(self):
        found = [] if self.output_path else ["--output_path is missing"]
        if self.size:
            found += unknown_name("size", self.size)
            if not found and "model" not in read_config("size", self.size):
                found.append(f"the size {self.size} starts from published weights: name their directory with "
                             "--tokenizer in place of --size")
        if self.max_documents is not None and self.max_documents < 1:
            found.append(f"max_documents is {self.max_documents}, expected at least 1")
        found += ["vocab_size is below 300: a byte-level vocabulary needs room"] if self.vocab_size < 300 else []
        return found


def prepare_text(s):
    """Writes train-*.npy and val-*.npy (token ids, documents ended by eos), the tokenizer's files and meta.json.

    Documents are read twice where a tokenizer is trained on them, and a batch at a time, so that a text of any length
    fits in memory. Which of the two splits a document belongs to depends on its content alone.
    """
    settings = asdict(s) | {"output_path": None}
    if (Path(s.output_path) / "meta.json").exists():
        made_with = read_json(Path(s.output_path) / "meta.json").get("settings", {})
        if made_with != settings:
            raise UserError(f"{s.output_path} was made with other settings: " + "; ".join(
                f"{name} is {made_with.get(name)!r} there and {value!r} here" for name, value in settings.items()
                if made_with.get(name) != value) + ". Remove it, or choose another --output_path")
        return print(f"{s.output_path} is there already")
    documents = partial(read_documents, s.source, s.text_column, s.dataset_config, s.max_documents)
    with new_directory(s.output_path) as folder:
        if s.tokenizer:
            tokenizer = Tokenizer(s.tokenizer)
            copy_tokenizer(s.tokenizer, folder)
        else:
            vocab_size = read_config("size", s.size)["model"]["vocab_size"] if s.size else s.vocab_size
            tokenizer = train_tokenizer(islice(documents(), TOKENIZER_DOCUMENTS), vocab_size, folder)
        if tokenizer.eos_id is None:
            raise UserError(f"{s.tokenizer} names no end-of-text token, which has to stand between documents")
        writers = {split: ShardWriter(folder, split, tokenizer) for split in ("train", "val")}
        unread, count = documents(), 0
        progress = tqdm(desc="writing tokens", unit="doc", disable=None)
        while batch := list(islice(unread, 1000)):
            count += len(batch)
            parts = {"train": [], "val": []}
            for text in batch:
                parts["val" if held_out(text) else "train"].append(text)
            for split, texts in parts.items():
                writers[split].add(texts)
            progress.update(len(batch))
        progress.close()
        if not all(writer.held or writer.shards for writer in writers.values()):
            raise UserError(f"{s.source} holds {count} documents, too few to hold {VALIDATION_PER_MILLE} in a "
                            "thousand out for validation")
        shards = {name: shard for writer in writers.values() for name, shard in writer.close().items()}
        write_json(folder / "meta.json", {"settings": settings, "documents": count,
                                          "vocab_size": tokenizer.vocab_size, "shards": shards})
    tokens = sum(shard["tokens"] for shard in shards.values())
    print(f"{s.output_path}: {count:,} documents, {tokens:,} tokens")


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


def train_tokenizer(documents, vocab_size, folder):
    """Trains a byte-level BPE vocabulary on some documents; <unk>, <s> and </s> are ids 0, 1 and 2, as in Llama."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    special = ["<unk>", "<s>", "</s>"]
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=sys.stderr.isatty(),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(documents, trainer)
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": special[0], "bos_token": special[1],
        "eos_token": special[2], "clean_up_tokenization_spaces": False})
    return Tokenizer(folder)


# ---------------------------------------------------------------------------------------- Hub datasets to raw folders

@dataclass(frozen=True)
class HubSettings:
    """Settings of `data_prep.py hub`."""
    task: str | None = setting(None, "task (a file in configs/task)")
    output_path: str | None = setting(None, "folder to make the task's folder of raw files in")
    dataset: str | None = setting(None, "Hub id, or a local directory of parquet files; none: the task's own")
    max_samples: int = setting(112_000, "most training samples; a tenth of them becomes the evaluation split")
    max_test_samples: int = setting(2_000, "most test samples")

    def problems(self):
        found = [f"--{name} is missing" for name in ("task", "output_path") if not getattr(self, name)]
        found += [f"{name} is {getattr(self, name)}, expected at least 1"
                  for name in ("max_samples", "max_test_samples") if getattr(self, name) < 1]
        return found + (unknown_name("task", self.task) if self.task else [])


def prepare_hub(s):
    """Writes the raw folder of a task from its Hub dataset, in the format that `data_prep.py task` reads."""
    spec = read_config("task", s.task)
    if (Path(s.output_path) / spec["folder"]).exists():
        return print(f"{s.output_path}/{spec['folder']} is there already")
    hub, name = spec["hub"], s.dataset or spec["hub"]["dataset"]
    columns = [*hub["columns"].values(), *(hub[key] for key in ("dialogue", "references") if key in hub),
               *([hub["labels"]["column"]] if "labels" in hub else [])]
    limits = {"train": s.max_samples, "test": s.max_test_samples}
    splits = {}
    for split, hub_split in hub["splits"].items():
        rows = load_hub_dataset(name, hub_split, columns, hub.get("config"), hub.get("revision"))
        wanted = limits[split] if "test" in hub["splits"] else sum(limits.values())
        splits[split] = list(islice(chain.from_iterable(hub_items(row, hub) for row in tqdm(rows, split, disable=None)),
                                    wanted))
    if "test" not in splits:
        tests = max(1, min(s.max_test_samples, len(splits["train"]) // 10))
        splits = {"train": splits["train"][:-tests], "test": splits["train"][-tests:]}
    with new_directory(Path(s.output_path) / spec["folder"]) as folder:
        for split, items in splits.items():
            for prompt, raw in raw_files(items, spec).items():
                write_json(folder / f"{prompt}.{split}.json", raw)
    print(f"{s.output_path}/{spec['folder']}: " + ", ".join(f"{len(items):,} {name}" for name, items in splits.items()))


def hub_items(row, hub):
    """Yields the src_info fields of each sample in a row of a Hub dataset (see [hub] in configs/task)."""
    info = {field: row[column] or "" for field, column in hub["columns"].items()}
    if "labels" in hub:
        label = row[hub["labels"]["column"]]
        if label is None or label < 0:  # datasets mark a missing label with -1
            return
        info[hub["labels"]["field"]] = hub["labels"]["names"][label]
    if "references" in hub and len(row[hub["references"]] or []) > 1:
        info["references"] = row[hub["references"]]
    if "dialogue" not in hub:
        yield info
        return
    turns = [turn["content"].strip() for turn in row[hub["dialogue"]]]
    for index in range(1, len(turns), 2):  # the listener's turns
        yield info | {"input_text": "\n".join(f"- {turn}" for turn in turns[:index]), "output_text": turns[index]}


def raw_files(items, spec):
    """Raw task files {prompt_name: {src, tgt, src_info}} from src_info fields, with the task's own wordings in turn."""
    wordings = [(name, wording) for name, wordings in spec["prompts"].items() for wording in wordings]
    files = {name: {"src": [], "tgt": [], "src_info": []} for name in spec["prompts"]}
    for index, info in enumerate(items):
        name, wording = wordings[index % len(wordings)]
        files[name]["src"].append(re.sub(r"\[(\w+)\]", lambda match, info=info: info[match[1]], wording))
        files[name]["tgt"].append(info.get("references", info[spec["target"]]))
        files[name]["src_info"].append(info | {"prompt": wording, "prompt_name": name})
    return files


# ----------------------------------------------------------------------------------------- items of the sample suite

@dataclass(frozen=True)
class SuiteSettings:
    """Settings of `data_prep.py suite`."""
    output_path: str | None = setting(None, "folder to write the items of the sample suite into")

    def problems(self):
        return [] if self.output_path else ["--output_path is missing"]


def prepare_suite(s):
    """Writes the JSONL files that configs/eval/sample.toml names."""
    if Path(s.output_path).exists():
        return print(f"{s.output_path} is there already")
    passages = read_raw_files(ROOT / "data/sample" / read_config("task", "inqqg")["folder"], "test")
    items = build_suite(filter(held_out, read_documents("docs")), [item["src_info"] for item in passages])
    items["pairs"] = read_json_lines(ROOT / "data/sample/bias/pairs.jsonl")
    with new_directory(s.output_path) as folder:
        for name, entries in items.items():
            lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
            write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    print(f"{s.output_path}: " + ", ".join(f"{len(entries):,} {name}" for name, entries in items.items()))


if __name__ == "__main__":
    run({"task": (TaskSettings, prepare_task), "text": (TextSettings, prepare_text), "hub": (HubSettings, prepare_hub),
         "suite": (SuiteSettings, prepare_suite)}, __doc__)
