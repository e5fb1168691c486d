"""Stages and their results, read from the files of evaluated runs."""
import functools
import re
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.statistics import NORMAL, Estimate, estimate_of_items
from common.files import UserError
from common.metrics_log import read_log
from common.provenance import read_record
from common.settings import known, read_toml
from evaluation.result_files import metric_value, read_results_file, read_task_results
from evaluation.suites import Benchmark, open_suite

STAGE = re.compile(r"m(\d+)(?:-(\w+))?")

METRICS = ("acc", "r@1", "pct_stereotype", "exact_match")  # tried in this order for benchmarks that no suite describes


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error, negative log-likelihood (nats) and accuracy of a multiple-choice benchmark."""
    ece: float
    nll: float
    accuracy: float


@dataclass
class Stage:
    """One checkpoint of one model: its results and how it was trained."""
    model: str
    seed: int
    number: int  # 0 is the start
    name: str
    task: str | None = None
    directory: Path | None = None
    method: str | None = None  # name of the method's folder if the run lies in one, else the method in run.json
    benchmarks: dict[str, Estimate] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)  # by benchmark
    sampled: dict[str, Calibration] = field(default_factory=dict)  # averaged over posterior samples
    described: dict[str, Benchmark] = field(default_factory=dict)  # suite entries in the results files, by benchmark
    ignored: list[str] = field(default_factory=list)  # names of results that have none of METRICS
    tasks: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # task -> {metric: Estimate}
    files: dict[str, Path] = field(default_factory=dict)  # benchmark -> the file it was read from
    run: dict[str, Any] = field(default_factory=dict)  # content of run.json
    log: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl


def read_runs(folder: str | Path) -> list[Stage]:
    """The stages in a folder of runs, in the directories <…>/<model>/[<method>/][seed-<n>/]m<k>[-<task>]/."""
    stages = [read_stage(path, int(match[1]), match[2]) for path in sorted(Path(folder).rglob("m[0-9]*"))
              if (match := STAGE.fullmatch(path.name)) and ((path / "eval").is_dir() or read_record(path))]
    if not any(stage.benchmarks or stage.tasks for stage in stages):
        raise UserError(f"{folder} holds no evaluated runs: expected <model>/m<k>-<task>/eval with results_*.json or "
                        "metrics-*.json in it, as evaluate.py writes them")
    return stages


def read_stage(path: Path, number: int, task: str | None) -> Stage:
    """The stage in a directory of a run. A folder is a method's if its name begins with the method in run.json."""
    run = read_record(path)
    settings = run.get("settings", {})
    seed, method, owner = settings.get("seed", 0), settings.get("method"), path.parent
    if seeded := re.fullmatch(r"seed-(\d+)", owner.name):
        seed, owner = int(seeded[1]), owner.parent
    if method is not None and (owner.name == method or owner.name.startswith(f"{method}-")):
        method, owner = owner.name, owner.parent
    stage = Stage(owner.name, seed, number, path.name, task, path, method, run=run,
                  log=read_log(path / "metrics.jsonl"))
    for file in sorted((path / "eval").glob("results_*.json")):
        add_results(stage, file)
    for found in read_task_results(path / "eval"):
        key = found["task"], found["run"].get("data_digest")
        stage.tasks[found["task"]] = {
            name: make_estimate(value["mean"], (value["high"] - value["low"]) / (2 * NORMAL),
                                found["scores"].get(name), key)
            for name, value in found["metrics"].items()}
    return stage


def read_results(source: str | Path) -> list[Stage]:
    """The stages of results that any lm-eval wrote.

    source: a folder with <model>/<stage>/**/results_*.json, or a TOML file with a list of [[result]], each with
    `model`, `stage` and `file` (relative to the TOML file). Stages that are not called m<k> are numbered in the order
    in which the TOML file first names them.
    """
    source = Path(source)
    listed = source.suffix == ".toml"
    files = listed_files(source) if listed else [
        (parts[0], parts[1], path) for path in sorted(source.rglob("results_*.json"))
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
    if incomplete := [entry for entry in entries if {"model", "stage", "file"} - entry.keys()]:
        raise UserError(f"{path}: each [[result]] needs model, stage and file; {incomplete[0]} lacks some")
    return [(entry["model"], str(entry["stage"]), path.parent / entry["file"]) for entry in entries]


def add_results(stage: Stage, path: Path) -> None:
    """Adds an lm-eval results file to a stage."""
    file = read_results_file(path)
    suite = {entry["name"]: entry for entry in file.run.get("suite", [])}
    described = {name: benchmark_of(entry) for name, entry in suite.items()}
    stage.described |= described
    benchmarks = shipped_benchmarks() | described
    parts = {child for children in file.groups.values() for child in children if child not in benchmarks}
    for name, entry in file.results.items():
        if name in parts or any(child in benchmarks for child in file.groups.get(name, [])):
            continue  # of a group and its parts, those that a suite names count, or else the group
        metrics = (benchmarks[name].metric,) if name in benchmarks else METRICS
        found = {metric: pair for metric in metrics if (pair := metric_value(entry, metric))}
        if not found:
            stage.ignored.append(name)
            continue
        metric, (value, error) = next(iter(found.items()))
        old = stage.benchmarks.get(name)
        if old is not None and old.value != value:
            raise UserError(f"{stage.model} {stage.name} has two results for {name} that disagree: {old.value} in "
                            f"{stage.files[name]}, {value} in {path}. Remove one of the files")
        key = name, suite.get(name, {}).get("file")
        stage.benchmarks[name], stage.files[name] = make_estimate(value, error, file.items(name, metric), key), path
        for suffix, calibration in (("none", stage.calibration), ("sampled", stage.sampled)):
            if f"ece,{suffix}" in entry:
                calibration[name] = Calibration(entry[f"ece,{suffix}"], entry[f"nll,{suffix}"],
                                                entry.get(f"acc,{suffix}", value))


def make_estimate(value: float, error: float, items: Sequence | None, key: tuple[Hashable, ...]) -> Estimate:
    """An Estimate that keeps its items if they are known and the value is their mean."""
    if not items or not all(isinstance(item, int | float) for item in items) or len(items) < 2 or \
            abs(statistics.fmean(items) - value) > 1e-4 * max(1, abs(value)):
        return Estimate(value, error)
    return estimate_of_items(items, (*key, len(items)))


def benchmark_of(entry: dict[str, Any]) -> Benchmark:
    """The Benchmark of a suite's entry, with the fields that a report needs."""
    return Benchmark(**{key: entry[key] for key in ("name", "category", "metric", "label", "part_of") if key in entry})


@functools.cache
def shipped_benchmarks() -> dict[str, Benchmark]:
    """The benchmarks of the suites in configs/eval, by name. `paper` has precedence: it uses lm-eval's own tasks."""
    found: dict[str, Benchmark] = {}
    for name in sorted(known("eval"), key=lambda name: name != "paper"):
        for entry in open_suite(name)[1]:
            found.setdefault(entry["name"], benchmark_of(entry))
    return found
