"""Figures of runs, read from what evaluation left on disk: lm-eval's results, task metrics, logs of training."""
import functools
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from analysis.statistics import NORMAL, Estimate, of_items
from common.files import UserError, read_json, read_json_lines
from common.metrics_log import read_log
from common.settings import known, read_toml
from evaluation.lm_eval_files import date_of, figure, sample_files
from evaluation.lm_eval_files import group_leaves as leaves
from evaluation.suites import Benchmark, open_suite

STAGE = re.compile(r"m(\d+)(?:-(\w+))?")

METRICS = ("acc", "r@1", "pct_stereotype", "exact_match")  # by which benchmarks are judged that no suite describes


@dataclass(frozen=True)
class Calibration:
    """Of a multiple-choice benchmark: expected calibration error, negative log-likelihood in nats, accuracy."""
    ece: float
    nll: float
    accuracy: float


@dataclass
class Stage:
    """One checkpoint of one model: what was measured on it, and how it was trained."""
    model: str
    seed: int
    number: int  # 0: the start
    name: str
    task: str | None = None
    directory: Path | None = None
    benchmarks: dict = field(default_factory=dict)  # name -> Estimate
    method: str | None = None  # the folder of its method, where the run has one
    calibration: dict = field(default_factory=dict)  # name of a benchmark -> Calibration
    sampled: dict = field(default_factory=dict)  # the same over draws of the weights
    ignored: list = field(default_factory=list)  # names of results that none of METRICS stands in
    tasks: dict = field(default_factory=dict)  # task -> {metric: Estimate}
    files: dict = field(default_factory=dict)  # name of a benchmark -> the file it was read from
    run: dict = field(default_factory=dict)  # its run.json
    log: list = field(default_factory=list)  # its metrics.jsonl


def read_runs(folder):
    """The stages under a folder of runs, <…>/<model>/[<method>/][seed-<n>/]m<k>[-<task>]/, and the benchmarks that they
    name. A folder that begins with the method of a stage's run.json is that of a method."""
    stages, found = [], {}
    for path in sorted(Path(folder).rglob("m[0-9]*")):
        match = STAGE.fullmatch(path.name)
        if not match or not (path / "eval").is_dir() and not (path / "run.json").exists():
            continue
        owner = path.parent
        seeded = re.fullmatch(r"seed-(\d+)", owner.name)
        run = read_json(path / "run.json") if (path / "run.json").exists() else {}
        seed = int(seeded[1]) if seeded else run.get("settings", {}).get("seed", 0)
        owner = owner.parent if seeded else owner
        method = run.get("settings", {}).get("method")
        apart = method is not None and (owner.name == method or owner.name.startswith(f"{method}-"))
        method = owner.name if apart else method
        stage = Stage((owner.parent if apart else owner).name, seed, int(match[1]), path.name, match[2], path, run=run,
                      log=read_log(path / "metrics.jsonl"), method=method)
        for file in sorted((path / "eval").glob("results_*.json")):
            found |= add_results(stage, file)
        for file in sorted((path / "eval").glob("metrics-*.json")):
            report = read_json(file)
            scores = task_scores(file.with_name(f"predictions-{report['task']}.jsonl"))
            key = report["task"], report.get("run", {}).get("data_digest")
            stage.tasks[report["task"]] = {
                name: estimate(value["mean"], (value["high"] - value["low"]) / (2 * NORMAL), scores.get(name), key)
                for name, value in report["metrics"].items()}
        stages.append(stage)
    if not any(stage.benchmarks or stage.tasks for stage in stages):
        raise UserError(f"{folder} holds no evaluated runs: expected <model>/m<k>-<task>/eval with results_*.json or "
                        "metrics-*.json in it, as evaluate.py writes them")
    return stages, found


def read_results(source):
    """The stages of results that any lm-eval wrote: a directory <model>/<stage>/**/results_*.json, or a TOML file with
    a list of [[result]], each with `model`, `stage` and `file` (beside the TOML file, if it is no absolute path)."""
    source = Path(source)
    if source.suffix == ".toml":
        entries = read_toml(source).get("result", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{source}: expected a list of [[result]], each with model, stage and file")
        if bad := [entry for entry in entries if {"model", "stage", "file"} - entry.keys()]:
            raise UserError(f"{source}: each [[result]] needs model, stage and file; {bad[0]} lacks some")
        files = [(entry["model"], str(entry["stage"]), source.parent / entry["file"]) for entry in entries]
    else:
        files = [(*path.relative_to(source).parts[:2], path) for path in sorted(source.rglob("results_*.json"))
                 if len(path.relative_to(source).parts) > 2]
    if not files:
        raise UserError(f"{source} holds no results: expected <model>/<stage>/**/results_*.json, or a .toml file that "
                        "names them")
    names = list(dict.fromkeys(name for _, name, _ in files))
    unnumbered = [name for name in names if not STAGE.fullmatch(name)]
    if unnumbered and source.suffix != ".toml":
        raise UserError(f"{source}: the folder {unnumbered[0]} does not say which stage it is: expected names such as "
                        "m0 and m1-simp, or a .toml file that lists the files in the order of the stages")
    stages, found = {}, {}
    for model, name, file in files:
        match = STAGE.fullmatch(name)
        number = names.index(name) if unnumbered else int(match[1])  # or as they first come in the .toml file
        stage = stages.setdefault((model, name), Stage(model, 0, number, name, match and match[2]))
        found |= add_results(stage, file)
    if not any(stage.benchmarks for stage in stages.values()):
        raise UserError(f"{source} holds no results with one of {', '.join(METRICS)}")
    return list(stages.values()), found


def add_results(stage, file):
    """Puts the figures of an lm-eval results file into a stage; returns the benchmarks that it describes itself."""
    found = read_json(file)
    if not isinstance(found.get("results"), dict):
        raise UserError(f"{file} is no results file of lm-eval: it has no \"results\"")
    described = {entry["name"]: described_by(entry) for entry in found.get("run", {}).get("suite", [])}
    known, groups = shipped() | described, found.get("group_subtasks", {})
    samples = {path.name.removeprefix("samples_").removesuffix(f"_{date_of(file)}.jsonl"): read_json_lines(path)
               for path in sample_files(file)}
    digests = {entry["name"]: entry.get("file") for entry in found.get("run", {}).get("suite", [])}
    inside = {child for children in groups.values() for child in children}
    for name, figures in found["results"].items():
        # of a group and its parts those count that a suite names, the group where none is named
        if any(child in known for child in groups.get(name, [])) or name in inside and name not in known:
            continue
        metrics = [known[name].metric] if name in known else METRICS
        metric, (value, error) = next(((metric, pair) for metric in metrics
                                       if (pair := figure(figures, metric))[0] is not None), (None, (None, None)))
        if value is None:
            stage.ignored.append(name)
            continue
        old = stage.benchmarks.get(name)
        if old is not None and old.value != value:
            raise UserError(f"{stage.model} {stage.name} has two results for {name} that disagree: {old.value} in "
                            f"{stage.files[name]}, {value} in {file}. Remove one of the files")
        items = [sample.get(metric) for task in leaves(name, groups) for sample in samples.get(task, ())]
        key = name, digests.get(name)
        stage.benchmarks[name], stage.files[name] = estimate(value, error, items, key), file
        for pipeline, into in (("none", stage.calibration), ("sampled", stage.sampled)):
            if f"ece,{pipeline}" in figures:
                into[name] = Calibration(*(figures[f"{key},{pipeline}"] for key in ("ece", "nll")),
                                         figures.get(f"acc,{pipeline}", value))
    return described


def task_scores(path):
    """{metric: the value of each item} of the predictions on a task; an empty dict where they are not there."""
    lines = [line.get("scores", {}) for line in read_json_lines(path)] if path.exists() else []
    return {name: [line.get(name) for line in lines] for name in (lines[0] if lines else ())}


def estimate(value, error, items, key):
    """An Estimate, with its items where they are known and make up the value."""
    if not items or not all(isinstance(item, int | float) for item in items) or len(items) < 2 or \
            abs(statistics.fmean(items) - value) > 1e-4 * max(1, abs(value)):
        return Estimate(value, error)
    return of_items(items, (*key, len(items)))


def described_by(entry):
    """The Benchmark of an entry of a suite, as far as a report needs it."""
    return Benchmark(**{key: entry[key] for key in ("name", "category", "metric", "label", "part_of") if key in entry})


@functools.cache
def shipped():
    """The benchmarks that the suites in configs/eval name; what two name is as in `paper`, which has lm-eval's own."""
    found = {}
    for name in sorted(known("eval"), key=lambda name: name != "paper"):
        for entry in open_suite(name)[1]:
            found.setdefault(entry["name"], described_by(entry))
    return found
