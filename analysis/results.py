"""Stages and their results, read from the files of evaluated runs."""
import math
import re
import statistics
from collections.abc import Hashable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from analysis.benchmark_catalog import benchmark_of, shipped_benchmarks, task_metric
from analysis.estimates import NORMAL, Estimate, estimate_of_items
from analysis.stages import (
    BENCHMARKS,
    CHOICE_METRICS,
    STAGE,
    TASKS,
    Calibration,
    Choices,
    ItemLosses,
    Stage,
    rate_text,
)
from common.configs import known, read_toml
from common.files import UserError, is_number, json_digest, parsing, walk
from common.metrics_log import read_log
from common.provenance import DEFAULT_TEMPLATE, RUN, read_record, wrong_types
from evaluation.conditions import Conditions, benchmark_conditions, shown, task_conditions, unlike
from evaluation.result_files import (
    ResultsFile,
    metric_value,
    read_losses,
    read_results_file,
    read_task_results,
    results_files,
)

# Tried in this order for benchmarks that no suite describes; of several filters of a metric the first one counts.
METRICS = "acc", "r@1", "pct_stereotype", "exact_match", "prompt_level_strict_acc"

# What losses depend on besides the model.
LOSS_SETTINGS = "dtype", "limit", "data_digest", "seq_length", "max_source_length", "max_target_length"

# The entries of run.json that a report uses, and their types.
SETTING_TYPES: dict[str, type | tuple[type, ...]] = {
    "seed": int, "method": (str, type(None)), "task": (str, type(None)), "num_train_epochs": (int, float),
    "max_steps": (int, type(None)), "learning_rate": (int, float)}
RESULT_TYPES: dict[str, type | tuple[type, ...]] = {"seconds": (int, float), "seconds_after": (int, float)}


def read_runs(folder: str | Path) -> list[Stage]:
    """The stages in a folder of runs, in the directories
    <…>/[pair-<n>/]<model>/[<method>/][rate-<rate>/][seed-<n>/]m<k>[-<task>]/."""
    found = sorted(root / name for root, folders, _ in walk(folder) for name in folders if STAGE.fullmatch(name))
    stages = [read_stage(path, int(match[1]), match[2]) for path in found
              if (match := STAGE.fullmatch(path.name)) and ((path / "eval").is_dir() or read_record(path))]
    if not any(stage.benchmarks or stage.tasks or stage.losses for stage in stages):
        raise UserError(f"{folder} holds no evaluated runs: expected <model>/m<k>-<task>/eval with results_*.json, "
                        "metrics-*.json or losses-*.json in it, as evaluate.py writes them")
    return stages


def read_stage(path: Path, number: int, task: str | None) -> Stage:
    """The stage in a directory of a run. A folder is a method's if its name begins with the method in run.json."""
    run = read_record(path)
    settings = run.get("settings", {})
    trained = [other for other in path.parent.glob("m[0-9]*") if (match := STAGE.fullmatch(other.name))
               and int(match[1]) and (other / RUN).exists()]
    if number and trained and not run:
        raise UserError(f"{path} has no {RUN}, which says how it was trained: restore it, or remove {path}")
    wrong = wrong_types(settings, SETTING_TYPES) + wrong_types(run.get("result", {}), RESULT_TYPES)
    if wrong or run and not settings:
        raise UserError(f"{path / RUN} is damaged or was not written by this program: its entry "
                        f"{[*wrong, 'settings'][0]!r} is not valid: restore it, or remove {path}")
    seed, method, owner = settings.get("seed", 0), settings.get("method"), path.parent
    if seeded := re.fullmatch(r"seed-(\d+)", owner.name):
        seed, owner = int(seeded[1]), owner.parent
    rate = None
    if rated := re.fullmatch(r"rate-(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)", owner.name):
        rate, owner = rate_text(rated[1]), owner.parent
    if method is not None and (owner.name == method or owner.name.startswith(f"{method}-")):
        method, owner = owner.name, owner.parent
    pair = re.fullmatch(r"pair-(\d+)", owner.parent.name)
    stage = Stage(owner.name, seed, number, path.name, task, path, method, run=run, rate=rate,
                  pair=int(pair[1]) if pair else None, log=read_log(path / "metrics.jsonl"))
    for file in results_files(path / "eval"):
        add_results(stage, file)
    for found in read_task_results(path / "eval"):
        with parsing(path / "eval", "a folder of results of evaluate.py"):
            add_task_results(stage, found)
    for found in read_losses(path / "eval"):
        stage.losses[found["name"]] = losses_of(found)
    return stage


def losses_of(found: dict[str, Any]) -> ItemLosses:
    """The losses in the content of a losses file."""
    items, run = found["items"], found["run"]
    conditions = {name: run[name] for name in LOSS_SETTINGS if name in run}
    conditions |= {"items": found["samples"], "template": run.get("template") or DEFAULT_TEMPLATE}
    # stand for the tokenizer: the digest of its files differs between programs that write the same tokenizer
    conditions["tokens and bytes"] = json_digest([items["tokens"], items["bytes"]])
    return ItemLosses(np.array(items["nll"], float), np.array(items["tokens"], float),
                      None if items["kl"] is None else np.array(items["kl"], float), conditions,
                      (text_of(run.get("checkpoint_digest")), text_of(run.get("reference_digest"))))


def text_of(value: Any) -> str | None:
    """A value of a results file that is text, or else None."""
    return value if isinstance(value, str) else None


def add_task_results(stage: Stage, found: dict[str, Any]) -> None:
    """Adds the content of a metrics file to a stage."""
    if (task := found["task"]) not in known("task"):
        raise UserError(f"{stage.directory}: results of an unknown task {task!r}, expected {', '.join(known('task'))}")
    metric = task_metric(task)
    if (value := found["metrics"].get(metric)) is None:
        stage.unused.append(f"{task} (no {metric})")
        return
    # the bootstrap of a single sample has no spread, which does not mean that its value is certain
    error = (value["high"] - value["low"]) / (2 * NORMAL) if found.get("samples") != 1 else math.nan
    stage.tasks[task] = make_estimate(value["mean"], error, found["scores"].get(metric),
                                      (task, found["run"].get("data_digest")))
    stage.conditions[TASKS, task] = task_conditions(found, metric)


def read_results(source: str | Path) -> list[Stage]:
    """The stages of results that any lm-eval wrote.

    source: a folder with <model>/<stage>/**/results_*.json, or a TOML file with a list of [[result]], each with
    `model`, `stage` and `file`: a file, a folder of files, or a pattern such as `*/*_m1_*`, relative to the TOML file.
    Stages that are not called m<k> are numbered in the order in which the TOML file first names them.
    """
    source = Path(source)
    listed = source.suffix == ".toml"
    files = listed_files(source) if listed else [
        (parts[0], parts[1], path) for path in results_files(source)
        if len(parts := path.relative_to(source).parts) > 2]
    if not files:
        raise UserError(f"{source} holds no results: expected <model>/<stage>/**/results_*.json, or a .toml file that "
                        "names them")
    names = list(dict.fromkeys(name for _, name, _ in files))
    unnumbered = [name for name in names if not STAGE.fullmatch(name)]
    if unnumbered and not listed:
        raise UserError(f"{source}: the folder {unnumbered[0]} does not say which stage it is: expected names such as "
                        "m0 and m1-simp, or a .toml file that lists the files in the order of the stages")
    stages: dict[tuple[str, str], Stage] = {}
    for model, name, file in files:
        match = STAGE.fullmatch(name)
        number = int(match[1]) if match and not unnumbered else names.index(name)
        stage = stages.setdefault((model, name), Stage(model, 0, number, name, match[2] if match else None))
        add_results(stage, file)
    if not any(stage.benchmarks for stage in stages.values()):
        raise UserError(f"{source} holds no results with one of {', '.join(METRICS)}")
    return list(stages.values())


def listed_files(path: Path) -> list[tuple[str, str, Path]]:
    """(model, stage, file) of each [[result]] in a TOML file."""
    entries = read_toml(path).get("result", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: expected a list of [[result]], each with model, stage and file")
    found = []
    for entry in entries:
        if wrong := [key for key in ("model", "stage", "file") if not isinstance(entry.get(key), str)]:
            raise UserError(f"{path}: each [[result]] needs model, stage and file, each a text; {' and '.join(wrong)} "
                            f"is not given in {entry}")
        pattern = path.parent / entry["file"]
        matches = sorted(path.parent / name for name in glob(entry["file"], root_dir=path.parent))
        for file in [pattern] if pattern.exists() else matches or [pattern]:
            if file.is_dir() and not results_files(file):
                raise UserError(f"{path}: the folder {file} holds no results_*.json")
            found += [(entry["model"], entry["stage"], one)
                      for one in (results_files(file) if file.is_dir() else [file])]
    return found


def add_results(stage: Stage, path: Path) -> None:
    """Adds an lm-eval results file to a stage."""
    file = read_results_file(path)
    with parsing(path, "a results file of lm-eval"):
        described = {entry["name"]: benchmark_of(entry) for entry in file.suite}
        stage.described |= described
        benchmarks = shipped_benchmarks() | described
        parts = {child for children in file.groups.values() for child in children if child not in benchmarks}
        for name, entry in file.results.items():
            if name in parts or any(child in benchmarks for child in file.groups.get(name, [])):
                continue  # of a group and its parts, those that a suite names count, or else the group
            metrics = (benchmarks[name].metric,) if name in benchmarks else METRICS
            filtered = [] if name in benchmarks else [key for metric in metrics for key in entry
                                                      if key.startswith(f"{metric},")]
            if metric := next((metric for metric in (*metrics, *filtered) if metric_value(entry, metric)), None):
                add_benchmark(stage, file, name, metric)
            else:
                stage.unused.append(f"{name} (no {', '.join(metrics)})")


def add_benchmark(stage: Stage, file: ResultsFile, name: str, metric: str) -> None:
    """Adds the value of a benchmark in a results file to a stage, unless the stage has a better one."""
    entry = file.results[name]
    conditions, value = benchmark_conditions(file, name, metric), metric_value(entry, metric)
    assert value, (name, metric)
    if name in stage.benchmarks and not replaces(stage, file, name, value[0], conditions):
        return
    stage.benchmarks[name] = make_estimate(*value, file.items(name, metric), (name, conditions.get("file")))
    stage.conditions[BENCHMARKS, name], stage.sources[name] = conditions, (file.path, bool(file.run))
    stage.choices.pop(name, None)
    if choices := choices_of(file, name, metric):
        stage.choices[name] = choices
    for suffix, calibration in (("none", stage.calibration), ("sampled", stage.sampled)):
        ece, nll, accuracy = (metric_value(entry, f"{key},{suffix}") for key in ("ece", "nll", "acc"))
        calibration.pop(name, None)
        if ece and nll:
            calibration[name] = Calibration(ece[0], nll[0], (accuracy or value)[0])


def choices_of(file: ResultsFile, name: str, metric: str) -> Choices | None:
    """The answers to a multiple-choice benchmark; None for others, and if its items are not known."""
    right, options = file.items(name, metric), file.items(name, "filtered_resps")
    if metric not in CHOICE_METRICS or not right or not all(map(is_number, right)) or \
            not all(isinstance(one, list) and len(one) > 1 and all(isinstance(option, list) for option in one)
                    for one in options):
        return None
    nll, bits = (np.array(values, float) if all(map(is_number, values)) else None
                 for values in (file.items(name, key) for key in ("nll", "bits_per_byte")))
    # for acc_mutual_info, lm-eval also measures every option without its context
    passes = 2 if all(map(is_number, file.items(name, "acc_mutual_info"))) else 1
    return Choices(np.array(right, float), nll, bits, statistics.fmean(passes / len(one) for one in options))


def replaces(stage: Stage, file: ResultsFile, name: str, value: float, conditions: Conditions) -> bool:
    """Whether the value of a benchmark in a results file replaces that of the stage.

    The value with more items is used, and of two by evaluate.py the newer one. Raises UserError if others disagree.
    """
    (path, is_own), old_value = stage.sources[name], stage.benchmarks[name].value
    old = stage.conditions[BENCHMARKS, name]
    differences = unlike(conditions, old)
    differs = value != old_value or bool(differences)
    if "items" in differences:
        is_better, reason = conditions["items"] > old["items"], "has more items"
    elif is_own and file.run:
        is_better, reason = True, "is newer"
    elif not differs:
        return False
    else:
        how = "".join(f", {key} {shown(old[key])} and {shown(conditions[key])}" for key in differences)
        raise UserError(f"{stage.model} {stage.name} has two results for {name} that disagree: {old_value} in {path}, "
                        f"{value} in {file.path}{how}. Remove one of the files")
    if differs:
        used, other = (file.path, path) if is_better else (path, file.path)
        stage.unused.append(f"{name} in {other.name} ({used.name} {reason})")
    return is_better


def make_estimate(value: float, error: float, items: Sequence | None, key: tuple[Hashable, ...]) -> Estimate:
    """An Estimate that keeps its items if they are known and the value is their mean."""
    if not items or not all(map(is_number, items)) or len(items) < 2 or \
            abs(statistics.fmean(items) - value) > 1e-4 * max(1, abs(value)):
        return Estimate(value, error)
    return estimate_of_items(items, (*key, len(items)))
