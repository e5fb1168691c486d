"""Prepares data: task files for fine-tuning, token shards for pretraining, raw task folders from the Hub, benchmarks.

    python data_prep.py task --task simp --folder_path data/raw --output_path data/prepared/raw/simp.json
    python data_prep.py text --source docs --size tiny --output_path data/text/tiny
    python data_prep.py hub --task simp --output_path data/raw
    python data_prep.py suite --output_path data/eval/sample
    python data_prep.py mutual --folder_path MuTual/data/mutual/dev
"""
import common.preamble

import os
import sys
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from common.configs import known, read_config
from common.files import UserError
from common.scripts import Commands, run
from common.settings import non_defaults, setting
from common.writing import ExistsError, new_directory
from corpus.documents import read_documents
from corpus.mutual import write_mutual
from corpus.raw_tasks import raw_task_exists, read_hub_task, read_raw_task, write_raw_task
from corpus.sample_suite import suite_exists, write_suite
from corpus.shards import shards_exist, write_shards
from corpus.tasks import lacking_source, split_indices, write_task
from model.config import size_config
from model.tokenizer import Tokenizer, copy_special_ids, copy_tokenizer, train_tokenizer

MAX_SAMPLES = 1_000_000_000  # an upper bound of settings
TOKENIZER_DOCUMENTS = 1_000_000  # maximum number of documents that a tokenizer is trained on


@dataclass(frozen=True)
class TaskDataConfig:
    """Settings of `data_prep.py task`."""
    task: str = setting(None, "task (a file in configs/task)", required=True, names="task")
    folder_path: str = setting(None, "folder of the task's raw files, or its parent folder", required=True)
    output_path: str = setting(None, "preprocessed file to write", required=True)
    eval_dataset_size: float = setting(0.1, "evaluation split: a share of the training data, or a number of samples",
                                       above=0, at_most=MAX_SAMPLES)

    def problems(self) -> list[str]:
        """Rejects a fractional number of samples."""
        size = self.eval_dataset_size
        expected = "a share below 1 or a whole number of samples"
        return [f"eval_dataset_size is {size}, expected {expected}"] if size > 1 and size % 1 > 0 else []


def source_text(item: dict, field: str) -> str:
    """The source text of an item, which several items may have with other prompts or targets."""
    return str(item["src_info"].get(field) or item["input"])


def prepare_task(cfg: TaskDataConfig) -> None:
    """Writes the preprocessed file of a task from its raw files."""
    spec, folder = read_config("task", cfg.task), Path(cfg.folder_path)
    if not (folder / spec["folder"]).is_dir() and folder.absolute().name != spec["folder"]:
        others = {read_config("task", name).get("folder"): name for name in known("task")}
        if other := others.get(folder.absolute().name):
            raise UserError(f"{folder} is the folder of the task {other}, expected {spec['folder']} or its parent "
                            "folder")
    train, test = read_raw_task(cfg.folder_path, spec)
    for problem in lacking_source(test, spec["source"]) if spec.get("sari") else ():
        print(f"{folder}: {problem}", file=sys.stderr)
    indices = split_indices(len(train), cfg.eval_dataset_size)
    splits = {name: [train[i] for i in part] for name, part in zip(("train", "eval"), indices)} | {"test": test}
    trained = {(item["input"], item["output"]) for item in splits["train"]}
    sources = {source_text(item, spec["source"]) for item in splits["train"]}
    for name in ("eval", "test"):
        if known_items := sum((item["input"], item["output"]) in trained for item in splits[name]):
            print(f"{known_items} of {len(splits[name])} {name} items are training items as well", file=sys.stderr)
        if known_sources := sum(source_text(item, spec["source"]) in sources for item in splits[name]):
            print(f"{known_sources} of {len(splits[name])} {name} items have the source text of a training item: the "
                  "loss on them is not that of new texts", file=sys.stderr)
    changed = write_task(cfg.output_path, splits)
    print(f"{cfg.output_path}: {format_counts(splits)}" + ("" if changed else " (unchanged)"))


@dataclass(frozen=True)
class TextDataConfig:
    """Settings of `data_prep.py text`."""
    source: str = setting("docs", "docs (the installed packages' documentation), a .jsonl file, a .txt file, which "
                                  "is cut into documents of about 10,000 characters, a folder of such files, or a Hub "
                                  "dataset's name")
    output_path: str = setting(None, "directory to create", required=True)
    size: str | None = setting(None, "size preset whose vocabulary size the tokenizer gets", names="size")
    vocab_size: int = setting(4096, "vocabulary size of the tokenizer if no size is given; a byte-level vocabulary "
                                    "needs at least 300", at_least=300, at_most=1 << 20)
    tokenizer: str | None = setting(None, "checkpoint directory whose tokenizer to use; none: train one on the text")
    text_column: str = setting("text", "field of a .jsonl line or column of a Hub dataset that holds the text")
    dataset_config: str | None = setting(None, "configuration of a Hub dataset, such as en")
    max_documents: int | None = setting(None, "read only the first N documents", at_least=1)

    def problems(self) -> list[str]:
        """Rejects a size without a model shape, which has no vocabulary size, and settings without an effect."""
        found = []
        if self.size in known("size") and "model" not in read_config("size", self.size):
            found.append(f"the size {self.size} starts from published weights: give their directory as --tokenizer "
                         "instead of --size")
        is_text = self.source == "docs" or Path(self.source).suffix == ".txt"
        is_local = is_text or os.path.lexists(self.source)
        found += [f"{name} would change nothing, since {self.source} {what}" for name, is_useless, what in (
            ("text_column", is_text, "has no fields"), ("dataset_config", is_local, "is not a Hub dataset"))
            if is_useless and non_defaults(self, name)]
        given = non_defaults(self, "size", "vocab_size")
        if self.tokenizer and given:
            found.append(f"{' and '.join(given)} would change nothing, since --tokenizer gives the vocabulary")
        elif len(given) > 1:
            found.append("vocab_size would change nothing, since --size gives it")
        return found


def prepare_text(cfg: TextDataConfig) -> None:
    """Writes a directory of token shards with its tokenizer. To train a tokenizer, the documents are read twice."""
    settings = asdict(cfg) | {"output_path": None}
    documents = partial(read_documents, cfg.source, cfg.text_column, cfg.dataset_config, cfg.max_documents)
    try:
        with new_directory(cfg.output_path) as folder:
            if cfg.tokenizer:
                tokenizer = Tokenizer(cfg.tokenizer)
                copy_tokenizer(cfg.tokenizer, folder)
                copy_special_ids(cfg.tokenizer, folder)
            else:
                vocab_size = size_config(cfg.size).vocab_size if cfg.size else cfg.vocab_size
                tokenizer = train_tokenizer(islice(documents(), TOKENIZER_DOCUMENTS), vocab_size, folder)
            meta = write_shards(folder, documents(), tokenizer, settings)
    except ExistsError:
        if not shards_exist(cfg.output_path, settings):
            raise
        return print(f"{cfg.output_path} exists already: if the text has changed, remove it to make it again")
    tokens = {split: sum(shard["tokens"] for name, shard in meta["shards"].items() if name.startswith(split))
              for split in ("train", "val")}
    print(f"{cfg.output_path}: {meta['documents']:,} documents, {sum(tokens.values()):,} tokens, of which "
          f"{tokens['val']:,} are held out")


@dataclass(frozen=True)
class HubDataConfig:
    """Settings of `data_prep.py hub`."""
    task: str = setting(None, "task (a file in configs/task)", required=True, names="task")
    output_path: str = setting(None, "folder in which to create the task's folder of raw files", required=True)
    dataset: str | None = setting(None, "Hub id, or a local directory of parquet files; none: the task's own")
    max_samples: int = setting(112_000, "maximum number of training samples; a tenth becomes the evaluation split",
                               at_least=1, at_most=MAX_SAMPLES)
    max_test_samples: int | None = setting(None, "maximum number of test samples; none: the task's own", at_least=1,
                                           at_most=MAX_SAMPLES)
    test_split: str | None = setting(None, "split of the dataset that is the test set, such as test_asset of simp; "
                                           "none: the task's own")


def prepare_hub(cfg: HubDataConfig) -> None:
    """Writes the raw folder of a task from its Hub dataset, in the format that `data_prep.py task` reads."""
    spec = read_config("task", cfg.task)
    if lacking := [name for name in ("hub", "prompts", "target") if name not in spec]:
        raise UserError(f"configs/task/{cfg.task}.toml lacks {' and '.join(lacking)}, without which nothing can be "
                        "downloaded: give your own raw files with --folder_path, or RAW")
    folder = Path(cfg.output_path) / spec["folder"]
    settings = {name: value for name, value in asdict(cfg).items() if name != "output_path"}
    if raw_task_exists(folder, settings):
        return print(f"{folder} exists already")
    splits = read_hub_task(spec, cfg.dataset, cfg.max_samples, cfg.max_test_samples, cfg.test_split)
    try:
        write_raw_task(folder, splits, spec, settings)
    except ExistsError:
        if not folder.is_dir():
            raise
        return print(f"{folder} exists already: another process has made it in the meantime")
    print(f"{folder}: {format_counts(splits)}")


@dataclass(frozen=True)
class SuiteDataConfig:
    """Settings of `data_prep.py suite`."""
    output_path: str = setting(None, "folder to create for the items of the sample suite", required=True)


def prepare_suite(cfg: SuiteDataConfig) -> None:
    """Writes the items of the sample suite."""
    try:
        suite = write_suite(cfg.output_path)
    except ExistsError:
        if not suite_exists(cfg.output_path):
            raise
        return print(f"{cfg.output_path} exists already")
    print(f"{cfg.output_path}: {format_counts(suite)}")


@dataclass(frozen=True)
class MutualDataConfig:
    """Settings of `data_prep.py mutual`."""
    folder_path: str = setting(None, "a split of the published MuTual, such as MuTual/data/mutual/dev", required=True)
    output_path: str = setting("data/eval/paper/mutual.jsonl", "file to write")


def prepare_mutual(cfg: MutualDataConfig) -> None:
    """Writes the items of MuTual for the suite `paper`."""
    print(f"{cfg.output_path}: {write_mutual(cfg.folder_path, cfg.output_path):,} items")


def format_counts(lists: Mapping[str, Sized]) -> str:
    """The lengths of named lists: "3,600 train, 400 eval"."""
    return ", ".join(f"{len(items):,} {name}" for name, items in lists.items())


COMMANDS: Commands = {"task": (TaskDataConfig, prepare_task), "text": (TextDataConfig, prepare_text),
                      "hub": (HubDataConfig, prepare_hub), "suite": (SuiteDataConfig, prepare_suite),
                      "mutual": (MutualDataConfig, prepare_mutual)}

if __name__ == "__main__":
    run(COMMANDS, __doc__)
