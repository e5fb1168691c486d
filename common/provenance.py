"""Provenance of runs and checkpoints: commit, package versions, digests, lineage. run.json and growth.json."""
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from common.configs import ROOT
from common.files import UserError, digest, read_json
from common.writing import write_json

TemplateName = Literal["alpaca", "chat", "plain"]  # of the prompts of tasks, see corpus/prompts.py
DEFAULT_TEMPLATE: TemplateName = "alpaca"  # also where a record names none
RUN, GROWTH = "run.json", "growth.json"  # the records of a run and of a growth, in their directories

# Settings that may differ when a run is continued: they do not change its weights, or a digest (init, data,
# replay_text) or other settings (method) stand for them.
OPERATIONAL = {"out", "init", "data", "max_tokens_per_microbatch", "microbatch_overhead_tokens",
               "gradient_checkpointing", "logging_steps", "save_total_limit", "save_minutes", "timeout_minutes",
               "held_out_text", "examples", "tensorboard", "wandb", "local_rank", "zero", "offload", "deepspeed",
               "replay_text", "method", "compile"}
PACKAGES = ("torch", "deepspeed", "tokenizers", "sentencepiece", "safetensors", "numpy")
DIGESTS = {"parent_digest": "the initial weights", "data_digest": "the data", "rehearsed": "the data of earlier tasks",
           "side_digest": "the posterior, Fisher information or moments of the run before",
           "replay_digest": "the replayed text", "start_digest": "the weights that the chain of tasks started from",
           "tokenizer_digest": "the tokenizer files"}


def git_commit() -> str | None:
    """The commit of this program, with "-dirty" if files have changed since; None outside a repository of its own."""
    # another repository may contain it, or be named by the variables of a git hook
    inside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    inside["GIT_CEILING_DIRECTORIES"] = str(ROOT.parent)
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True,
                                cwd=ROOT, env=inside, capture_output=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(settings: Mapping[str, Any], parent_digest: str | None, training_digest: str,
             **facts: Any) -> dict[str, Any]:
    """The content of run.json before a run starts: settings, the digests of the initial weights and of the training
    data, and further digests and facts."""
    return {"settings": settings, "parent_digest": parent_digest, "data_digest": training_digest,
            "commit": git_commit(), "python": sys.version.split()[0],
            "versions": {name: version(name) for name in PACKAGES}, **facts}


def write_record(directory: str | Path, record: Mapping[str, Any], name: str = RUN) -> None:
    """Writes the record of a run or a growth to its directory, atomically."""
    write_json(Path(directory) / name, record)


# The entries of run.json and growth.json that are read again, and their types.
RECORD_TYPES: dict[str, type | tuple[type, ...]] = {
    "settings": dict, "result": dict, "lineage": dict, "parent_digest": (str, type(None)), "data_digest": str,
    "rehearsed": list, "replay_digest": str, "start_digest": str, "side_digest": str,
    "tokenizer_digest": str, "resumed": list, "layer_map": list, "id": str}
LINEAGE_TYPES: dict[str, type | tuple[type, ...]] = {
    "flops": (int, float), "text": dict, "tasks": list, "start": dict, "new_layers": list, "inserted": int,
    "updates": int}
LINEAGE_TASK_TYPES: dict[str, type | tuple[type, ...]] = {
    "task": str, "data": str, "data_digest": str, "max_train_samples": (int, type(None))}
START_KEYS = "init", "digest"


def read_record(directory: str | Path, name: str = RUN) -> dict[str, Any]:
    """The record of a run or a growth; empty if the directory has none. Raises UserError if it is damaged."""
    path = Path(directory) / name
    if not path.exists():
        return {}
    record = read_json(path, dict)
    lineage = record.get("lineage", {})
    problems = wrong_types(record, RECORD_TYPES) or wrong_types(lineage, LINEAGE_TYPES) or [
        "tasks" for task in lineage.get("tasks", [])
        if not isinstance(task, dict) or LINEAGE_TASK_TYPES.keys() - task or wrong_types(task, LINEAGE_TASK_TYPES)
        or task.get("template", DEFAULT_TEMPLATE) not in get_args(TemplateName)] or [
        "start" for key in START_KEYS if "start" in lineage and not isinstance(lineage["start"].get(key), str)] or [
        "text"] * bool(wrong_types(lineage.get("text", {}), {"samples": int}))
    if problems:
        raise UserError(f"{path} is damaged or was not written by this program: its entry {problems[0]!r} is not "
                        f"valid: restore it, or remove {directory}")
    return record


def wrong_types(values: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> list[str]:
    """The names of values that do not have the expected types."""
    return [name for name, kind in types.items() if name in values
            and (not isinstance(values[name], kind) or isinstance(values[name], bool))]


def read_lineage(checkpoint: str | Path) -> dict[str, Any]:
    """The training history of a checkpoint, from its growth.json or run.json; empty if it has neither.

    Returns:
        A dictionary with some of the keys
        "flops": floating-point operations of training, including those of the checkpoints it was made from;
        "text": the text it was pretrained on and the position reached in its sample stream, {data_digest, seed,
        seq_length, max_train_samples, samples};
        "tasks": the tasks it was fine-tuned on, in order, [{task, data, data_digest, max_train_samples, template}];
        "start": the checkpoint that the first of these tasks started from, {init, digest};
        "new_layers": the layers that the last growth added;
        "inserted": the number of layers that the chain of tasks, or its last task, began by inserting;
        "updates": the updates of the optimizer whose moments are next to the checkpoint.
    """
    return (read_record(checkpoint, GROWTH) or read_record(checkpoint)).get("lineage", {})


def last_template(lineage: Mapping[str, Any]) -> TemplateName | None:
    """The name of the prompts of the last task in a lineage; None without a task."""
    tasks = lineage.get("tasks", [])
    return tasks[-1].get("template", DEFAULT_TEMPLATE) if tasks else None


def changed(old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """The differences between two mappings, as sentences."""
    return [f"{name} is {old.get(name)!r} there and {new.get(name)!r} here"
            for name in sorted((old.keys() | new.keys()) - set(ignored)) if old.get(name) != new.get(name)]


def require_same_settings(directory: str | Path, recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UserError if data in a directory were made with other settings than these."""
    if found := changed(recorded, settings):
        raise UserError(f"{directory} was made with other settings: {'; '.join(found)}. Remove it, or choose another "
                        "--output_path")


def differences(record: Mapping[str, Any], recorded: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The differences between the records of a run and of an earlier one, as sentences.

    A setting that the earlier one lacks, because it did not exist yet, had its default value.
    """
    found = changed({**defaults, **recorded.get("settings", {})}, record["settings"], OPERATIONAL)
    return found + [f"different: {what} ({recorded.get(key)!s:.12} there, {record.get(key)!s:.12} here)"
                    for key, what in DIGESTS.items()
                    if recorded.get(key) != record.get(key)]


def data_digest(path: str | Path) -> str:
    """SHA-256 of a task file, or of a shard directory's meta.json, which holds the digests of the shards."""
    path = Path(path)
    file = path if path.is_file() else path / "meta.json"
    if not file.is_file():
        what = "is not a directory of token shards with a meta.json" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: make token shards with data_prep.py text")
    return digest([file])
