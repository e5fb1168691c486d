"""Prepares data: task files for fine-tuning, token shards for pretraining, raw task folders from the Hub, benchmarks.

    python data_prep.py task --task simp --folder_path data/raw --output_path data/prepared/raw/simp.json
    python data_prep.py text --source docs --size tiny --output_path data/text/tiny
    python data_prep.py hub --task simp --output_path data/raw
    python data_prep.py suite --output_path data/eval/sample
"""
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from common.files import UserError, new_directory, read_json, read_json_lines, write_json, write_text
from common.settings import ROOT, read_config, run, setting, unknown_name
from corpus.documents import VALIDATION_PER_MILLE, held_out, load_hub_dataset, read_documents
from corpus.hub_tasks import hub_items, raw_files
from corpus.sample_suite import build_suite
from corpus.shards import ShardWriter
from corpus.tasks import read_raw_files, split_indices
from model.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer

TOKENIZER_DOCUMENTS = 1_000_000  # a vocabulary is trained on the first of them


@dataclass(frozen=True)
class TaskDataConfig:
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


def prepare_task(cfg):
    """Writes one JSON object with the lists train, eval and test of {input, output, src_info, index}."""
    spec = read_config("task", cfg.task)
    folder = Path(cfg.folder_path)
    folder = folder / spec["folder"] if (folder / spec["folder"]).is_dir() else folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected the raw files of {cfg.task}, or a folder {spec['folder']} with "
                        "them")
    train, test = (read_raw_files(folder, word) for word in ("train", "test"))
    if "test_prompt" in spec:
        prompts = sorted({str(item["src_info"].get("prompt_name")) for item in test})
        test = [item for item in test if item["src_info"].get("prompt_name") == spec["test_prompt"]]
        if not test:
            raise UserError(f"{folder}: no test item has prompt_name {spec['test_prompt']!r}; found "
                            + ", ".join(prompts))
    train_indices, eval_indices = split_indices(len(train), cfg.eval_dataset_size)
    splits = {"train": [train[i] for i in train_indices], "eval": [train[i] for i in eval_indices], "test": test}
    text = json.dumps(splits, ensure_ascii=False, indent=1) + "\n"
    counts = ", ".join(f"{len(items):,} {name}" for name, items in splits.items())
    path = Path(cfg.output_path)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return print(f"{path}: {counts} (unchanged)")
    write_text(path, text)
    print(f"{path}: {counts}")


@dataclass(frozen=True)
class TextDataConfig:
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


def prepare_text(cfg):
    """Writes train-*.npy and val-*.npy (token ids, documents ended by eos), the tokenizer's files and meta.json.

    Documents are read twice where a tokenizer is trained on them, and a batch at a time, so that a text of any length
    fits in memory. Which of the two splits a document belongs to depends on its content alone.
    """
    settings = asdict(cfg) | {"output_path": None}
    if (Path(cfg.output_path) / "meta.json").exists():
        made_with = read_json(Path(cfg.output_path) / "meta.json").get("settings", {})
        if made_with != settings:
            raise UserError(f"{cfg.output_path} was made with other settings: " + "; ".join(
                f"{name} is {made_with.get(name)!r} there and {value!r} here" for name, value in settings.items()
                if made_with.get(name) != value) + ". Remove it, or choose another --output_path")
        return print(f"{cfg.output_path} is there already")
    documents = partial(read_documents, cfg.source, cfg.text_column, cfg.dataset_config, cfg.max_documents)
    with new_directory(cfg.output_path) as folder:
        if cfg.tokenizer:
            tokenizer = Tokenizer(cfg.tokenizer)
            copy_tokenizer(cfg.tokenizer, folder)
        else:
            vocab_size = read_config("size", cfg.size)["model"]["vocab_size"] if cfg.size else cfg.vocab_size
            tokenizer = train_tokenizer(islice(documents(), TOKENIZER_DOCUMENTS), vocab_size, folder)
        if tokenizer.eos_id is None:
            raise UserError(f"{cfg.tokenizer} names no end-of-text token, which has to stand between documents")
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
            raise UserError(f"{cfg.source} holds {count} documents, too few to hold {VALIDATION_PER_MILLE} in a "
                            "thousand out for validation")
        shards = {name: shard for writer in writers.values() for name, shard in writer.close().items()}
        write_json(folder / "meta.json", {"settings": settings, "documents": count,
                                          "vocab_size": tokenizer.vocab_size, "shards": shards})
    tokens = sum(shard["tokens"] for shard in shards.values())
    print(f"{cfg.output_path}: {count:,} documents, {tokens:,} tokens")


@dataclass(frozen=True)
class HubDataConfig:
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


def prepare_hub(cfg):
    """Writes the raw folder of a task from its Hub dataset, in the format that `data_prep.py task` reads."""
    spec = read_config("task", cfg.task)
    if (Path(cfg.output_path) / spec["folder"]).exists():
        return print(f"{cfg.output_path}/{spec['folder']} is there already")
    hub, name = spec["hub"], cfg.dataset or spec["hub"]["dataset"]
    columns = [*hub["columns"].values(), *(hub[key] for key in ("dialogue", "references") if key in hub),
               *([hub["labels"]["column"]] if "labels" in hub else [])]
    limits = {"train": cfg.max_samples, "test": cfg.max_test_samples}
    splits = {}
    for split, hub_split in hub["splits"].items():
        rows = load_hub_dataset(name, hub_split, columns, hub.get("config"), hub.get("revision"))
        wanted = limits[split] if "test" in hub["splits"] else sum(limits.values())
        splits[split] = list(islice(chain.from_iterable(hub_items(row, hub) for row in tqdm(rows, split, disable=None)),
                                    wanted))
    if "test" not in splits:
        tests = max(1, min(cfg.max_test_samples, len(splits["train"]) // 10))
        splits = {"train": splits["train"][:-tests], "test": splits["train"][-tests:]}
    with new_directory(Path(cfg.output_path) / spec["folder"]) as folder:
        for split, items in splits.items():
            for prompt, raw in raw_files(items, spec).items():
                write_json(folder / f"{prompt}.{split}.json", raw)
    print(f"{cfg.output_path}/{spec['folder']}: " + ", ".join(f"{len(items):,} {name}" for name, items in splits.items()))


@dataclass(frozen=True)
class SuiteDataConfig:
    """Settings of `data_prep.py suite`."""
    output_path: str | None = setting(None, "folder to write the items of the sample suite into")

    def problems(self):
        return [] if self.output_path else ["--output_path is missing"]


def prepare_suite(cfg):
    """Writes the JSONL files that configs/eval/sample.toml names."""
    if Path(cfg.output_path).exists():
        return print(f"{cfg.output_path} is there already")
    passages = read_raw_files(ROOT / "data/sample" / read_config("task", "inqqg")["folder"], "test")
    items = build_suite(filter(held_out, read_documents("docs")), [item["src_info"] for item in passages])
    items["pairs"] = read_json_lines(ROOT / "data/sample/bias/pairs.jsonl")
    with new_directory(cfg.output_path) as folder:
        for name, entries in items.items():
            lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
            write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    print(f"{cfg.output_path}: " + ", ".join(f"{len(entries):,} {name}" for name, entries in items.items()))


if __name__ == "__main__":
    run({"task": (TaskDataConfig, prepare_task), "text": (TextDataConfig, prepare_text), "hub": (HubDataConfig, prepare_hub),
         "suite": (SuiteDataConfig, prepare_suite)}, __doc__)
