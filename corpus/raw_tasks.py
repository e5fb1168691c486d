"""Raw task files: one JSON object with the parallel lists src, tgt and src_info. Writer, from Hub datasets, and reader.

The folder of a task holds a file for each prompt and split, with "train" or "test" in its name. `spec` is the content
of configs/task/<name>.toml.
"""
import re
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from common.files import UserError, parsing, read_json
from common.formatting import format_names
from common.provenance import require_same_settings
from common.writing import new_directory, write_json
from corpus.documents import load_hub_dataset

LISTS = ("src", "tgt", "src_info")
SETTINGS = "hub.settings"  # file with the settings of data_prep.py hub that a raw folder was made with
TEST_SAMPLES = 2_000  # of a task on the Hub, unless configs/task says otherwise
BRACKETS = {"lrb": "(", "rrb": ")", "lsb": "[", "rsb": "]"}  # Penn Treebank escapes; both cases occur


def read_hub_task(spec: dict[str, Any], dataset: str | None, max_train: int, max_test: int | None = None,
                  test_split: str | None = None) -> dict[str, list[dict]]:
    """{"train", "test"}: the src_info fields of at most `max_train` and `max_test` samples of a task on the Hub.

    `dataset` and `test_split` replace the Hub id and the test split in `spec`, the task's configuration. Without a test
    split, the last samples of the training split are the test set. Raises UserError for a row without the fields that
    `spec` names, and if a split would be empty.
    """
    hub = spec["hub"]
    name, max_test = dataset or hub["dataset"], max_test or hub.get("test_samples", TEST_SAMPLES)
    test_split = test_split or hub["splits"].get("test")
    train = read_hub_split(name, hub["splits"]["train"], hub)
    if test_split:
        splits = {"train": list(islice(train, max_train)),
                  "test": list(islice(read_hub_split(name, test_split, hub), max_test))}
    else:
        splits = cut_test_set(train, max_train, max_test, hub.get("held_out", max_test))
    if empty := [split for split, samples in splits.items() if not samples]:
        raise UserError(f"{name} holds no {' and no '.join(empty)} samples")
    return splits


def read_hub_split(name: str, split: str, hub: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the src_info fields of each sample in a split of a Hub dataset."""
    columns = [*hub["columns"].values(), *(hub[key] for key in ("dialogue", "references") if key in hub),
               *([hub["labels"]["column"]] if "labels" in hub else [])]
    for number, row in enumerate(load_hub_dataset(name, split, columns, hub.get("config"), hub.get("revision"))):
        yield from row_samples(row, hub, f"{name}: row {number} of the split {split!r}")


def cut_test_set(samples: Iterable[dict], max_train: int, max_test: int, held_out: int) -> dict[str, list[dict]]:
    """{"train", "test"} of samples: the last `held_out` ones, at most a tenth, are not trained on; the last `max_test`
    of those are the test set."""
    train: list[dict] = []
    end: deque[dict] = deque(maxlen=held_out)
    count = 0
    for sample in samples:
        if count < max_train:
            train.append(sample)
        end.append(sample)
        count += 1
    held_out = min(held_out, max(1, count // 10))
    return {"train": train[:max(0, count - held_out)], "test": list(end)[-min(max_test, held_out):]}


def row_samples(row: dict[str, Any], hub: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The src_info fields of each sample in a row of a Hub dataset, as [hub] in configs/task describes it.

    Raises UserError, which begins with `where`, if the row does not fit the description.
    """
    with parsing(where, "as configs/task describes it"):
        info: dict[str, Any] = {field: checked_text(row[column]) for field, column in hub["columns"].items()}
        if "labels" in hub:
            label = row[hub["labels"]["column"]]
            if label is None or label < 0:  # datasets mark a missing label with -1
                return []
            info[hub["labels"]["field"]] = hub["labels"]["names"][label]
        if any(not re.fullmatch(pattern, info[field]) for field, pattern in hub.get("matches", {}).items()):
            return []
        if "references" in hub and len(references := checked_texts(row[hub["references"]] or [])) > 1:
            info["references"] = references
        return [info | sample for sample in dialogue_samples(row[hub["dialogue"]])] if "dialogue" in hub else [info]


def dialogue_samples(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The src_info fields of each turn but the first: it answers the turns before it. The turns of both
    speakers are samples."""
    if unknown := {turn["role"] for turn in turns} - {"user", "assistant"}:
        raise ValueError(f"unknown roles {sorted(map(str, unknown))}")
    texts = [checked_text(turn["content"]).strip() for turn in turns]
    return [{"input_text": "\n".join(f"- {text}" for text in texts[:index]), "output_text": texts[index]}
            for index in range(1, len(turns))]


def checked_text(value: Any) -> str:
    """The text, or an empty one for None. Raises TypeError for another value."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected a text, found {value!r:.40}")
    return value or ""


def checked_texts(values: Any) -> list[str]:
    """The non-empty ones of the texts in a list. Raises TypeError for another value."""
    if not isinstance(values, list):
        raise TypeError(f"expected a list of texts, found {values!r:.40}")
    return [text for value in values if (text := checked_text(value)).strip()]


def restore_brackets(text: str) -> str:
    """The text with brackets in place of -LRB-, -RRB-, -LSB- and -RSB-, stripped of surrounding whitespace."""
    flags = re.IGNORECASE | re.ASCII
    return re.sub("-([lr][rs]b)-", lambda match: BRACKETS[match[1].lower()], text, flags=flags).strip()


def raw_task_exists(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a raw folder exists. Raises UserError if it was made from the Hub with other settings."""
    if (folder / SETTINGS).exists():
        require_same_settings(folder, read_json(folder / SETTINGS, dict), settings)
    return folder.is_dir()


def write_raw_task(folder: Path, splits: dict[str, list[dict]], spec: dict[str, Any],
                   settings: Mapping[str, Any]) -> None:
    """Writes the raw folder of a task atomically, with the settings that it is made with. `splits` maps "train" and
    "test" to lists of src_info fields."""
    with new_directory(folder) as partial:
        write_json(partial / SETTINGS, settings)
        for split, samples in splits.items():
            for prompt_name, raw in build_raw_files(samples, spec).items():
                write_json(partial / f"{prompt_name}.{split}.json", raw)


def build_raw_files(samples: Iterable[dict], spec: dict[str, Any]) -> dict[str, dict[str, list]]:
    """Raw files {prompt_name: {src, tgt, src_info}}; the samples cycle through the task's prompt templates."""
    templates = [(name, template) for name, templates in spec["prompts"].items() for template in templates]
    files: dict[str, dict[str, list]] = {name: {"src": [], "tgt": [], "src_info": []} for name in spec["prompts"]}
    for index, info in enumerate(samples):
        name, template = templates[index % len(templates)]
        info = info | constraint(name, info[spec["target"]])
        files[name]["src"].append(fill_template(template, info))
        files[name]["tgt"].append(info.get("references", info[spec["target"]]))
        files[name]["src_info"].append(info | {"prompt": template, "prompt_name": name})
    return files


def constraint(prompt_name: str, target: str) -> dict[str, str]:
    """The fields of a prompt that asks for a target with a certain word: its first, its last, or any of its words.

    The prompts with "constrain_start", "constrain_end" or "constrain_contain" in their name have them (Scialom et al.,
    arXiv 2205.12393). Which word "any" is depends on the target alone.
    """
    found = re.match("constrain_(start|contain|end)", prompt_name)
    if not found:
        return {}
    words = target.split() or [""]
    place = {"start": 0, "end": -1}.get(found[1], zlib.crc32(target.encode()) % len(words))
    return {"TO_REPLACE_1": words[place], "constrain_type": found[1]}


def fill_template(template: str, fields: dict[str, str]) -> str:
    """The prompt template with the value of each [field] inserted. Raises UserError for a field that a sample lacks."""
    if unknown := [name for name in re.findall(r"\[(\w+)\]", template) if name not in fields]:
        raise UserError(f"the prompt {template!r:.80} names [{unknown[0]}], and samples have {', '.join(fields)}: "
                        "change [prompts] in the task's file in configs/task")
    return re.sub(r"\[(\w+)\]", lambda match: fields[match[1]], template)


def read_raw_task(path: str | Path, spec: dict[str, Any]) -> tuple[list[dict], list[dict]]:
    """(training, test) items {input, output, src_info, index}; several targets add `references`.

    The raw files are in the task's folder in `path` or in `path` itself. If the task has a `test_prompt`, a list, only
    the test items with these prompts are returned; if there are none, all, with a note.
    """
    folder = Path(path) / spec["folder"] if (Path(path) / spec["folder"]).is_dir() else Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected the raw files of the task, or a folder {spec['folder']} "
                        "with them")
    if ignored := [path.name for path in json_files(folder) if split_of_file(path) is None]:
        print(f"{folder}: not read, since the names say neither train nor test: {format_names(ignored)}",
              file=sys.stderr)
    train, test = (read_raw_split(folder, split, spec["source"]) for split in ("train", "test"))
    prompts = spec.get("test_prompt", [])
    chosen = [item for item in test if item["src_info"].get("prompt_name") in prompts]
    if prompts and not chosen:
        found = sorted({str(item["src_info"].get("prompt_name")) for item in test})
        print(f"{folder}: no test item has the prompt_name {' or '.join(prompts)}, so that all {len(test)} are used: "
              f"{format_names(found)}", file=sys.stderr)
    return train, chosen or test


def json_files(folder: Path) -> list[Path]:
    """The files *.json of a folder, in the order of their names; no hidden ones."""
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def read_raw_split(folder: Path, split: str, source_field: str) -> list[dict]:
    """The items of all files of a split, in the order of the names. Reports and skips items without a target.

    `source_field` is the field of src_info with the source text, for the metrics; it may be missing.
    """
    paths = [path for path in json_files(folder) if split_of_file(path) == split]
    if not paths:
        names = format_names(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(f"{folder} holds no {split} file: expected a *.json with a word in its name that begins with "
                        f"{split!r}; found {names}")
    items: list[dict] = []
    skipped: list[str] = []
    for path in paths:
        for number, (source, targets, info) in enumerate(read_raw_file(path, source_field)):
            if not (references := list(filter(None, map(restore_brackets, targets)))):
                skipped.append(f"{path.name}[{number}]")
                continue
            item = {"input": restore_brackets(source), "output": references[0], "src_info": info,
                    "index": len(items) + len(skipped)}  # skipped items count
            items.append(item | ({"references": references} if len(references) > 1 else {}))
    if skipped:
        print(f"{folder}: {len(skipped)} {split} items have an empty target and are skipped: {format_names(skipped)}",
              file=sys.stderr)
    if not items:
        raise UserError(f"{folder}: its {split} files hold no item with a target")
    return items


def read_raw_file(path: Path, source_field: str) -> Iterator[tuple[str, list[str], dict]]:
    """Yields (source, targets, src_info) of each item. Missing targets (null) are left out."""
    raw = read_json(path, dict)
    lists: dict[str, Any] = {key: raw.get(key) for key in LISTS}
    if missing := [key for key, value in lists.items() if not isinstance(value, list)]:
        raise UserError(f"{path} lacks the list {', '.join(missing)}: expected one object with the lists "
                        + ", ".join(LISTS))
    lengths = {key: len(value) for key, value in lists.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: the lists differ in length: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))
    for number, (source, target, info) in enumerate(zip(*lists.values())):
        try:
            if source is None or not isinstance(info, dict):
                raise TypeError("src or src_info")
            checked_text(info.get(source_field))
            source, targets = checked_text(source), checked_texts(target if isinstance(target, list) else [target])
        except TypeError as error:
            raise UserError(f"{path}: item {number}: expected a text as src, a text or a list of texts as tgt, and "
                            f"an object as src_info, whose {source_field!r} is a text ({error})") from None
        yield source, targets, info


def split_of_file(path: Path) -> str | None:
    """"train", "test" or None, from the name of a raw file.

    The name starts with the prompt's name, which may contain either word: constrain_start+make_a_title.test.json is a
    test file. The part after the first dot is therefore searched first. If it names no split, the words of the whole
    name are, which may begin with one: training_data.json.
    """
    name = path.stem.lower()
    part = name.partition(".")[2]
    found = [split for split in ("train", "test") if split in part]
    if not found and not re.search("val|dev", part):
        found = [split for split in ("train", "test") if re.search(f"(?<![a-z]){split}", name)]
    if len(found) == 2:
        raise UserError(f"{path} has both train and test in its name: rename it")
    return found[0] if found else None
