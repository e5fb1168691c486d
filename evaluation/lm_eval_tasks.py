"""Benchmarks of a suite as lm-eval tasks."""
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from common.files import UserError, first_line, read_json_lines
from common.settings import Resolved
from evaluation.suites import Benchmark, open_suite

# name of a benchmark -> (the task or group that simple_evaluate takes, all tasks in it)
Loaded = dict[str, tuple[Any, list[ConfigurableTask]]]


def read_suite(name: str, folder: str | Path | None = None) -> list[Benchmark]:
    """The benchmarks of a suite, parts included (see suites.open_suite). Raises UserError with all problems."""
    path, entries, folder = open_suite(name, folder)
    benchmarks, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            benchmarks.append(parse_benchmark(entry, f"[[benchmark]] {entry.get('name', number)}", folder))
        except UserError as error:
            problems.append(str(error))
    if not problems:
        if unknown := [b.name for b in benchmarks if not b.file and b.name not in task_manager().all_tasks]:
            problems.append(f"lm-eval {lm_eval.__version__} has no task {', '.join(unknown)}")
        benchmarks = [part for benchmark in benchmarks for part in with_parts(benchmark)]
        names = [benchmark.name for benchmark in benchmarks]
        problems += [f"{name} is listed twice" for name in sorted(set(names)) if names.count(name) > 1]
        problems += [f"{b.name} is part of {b.part_of}, which is not listed" for b in benchmarks
                     if b.part_of and b.part_of not in names]
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return benchmarks


def parse_benchmark(entry: dict[str, Any], title: str, folder: Path) -> Benchmark:
    """The Benchmark of an entry of a suite. Raises UserError with all problems of the entry."""
    fields = {field.name for field in dataclasses.fields(Benchmark)} - {"where", "options"}
    options = {key: value for key, value in entry.items() if key not in fields}
    resolved = Resolved(Benchmark)
    resolved.update({key: value for key, value in entry.items() if key in fields}, title)
    values = resolved.values
    problems = [f"{title} has no {key}" for key in ("name", "category") if key not in entry] + resolved.problems
    lm_eval_keys = {field.name for field in dataclasses.fields(lm_eval.config.task.TaskConfig)}
    problems += [f"{title}: unknown key {key!r}" for key in options if key not in lm_eval_keys]
    problems += [f"{title}: num_fewshot is below 0"] if values.get("num_fewshot", 0) < 0 else []
    if "file" not in entry:
        if local := {"pairs", "by"} & entry.keys() | options.keys():
            problems.append(f"{title}: {', '.join(sorted(local))} needs a file; tasks of lm-eval have their own")
    else:
        pairs = values.get("pairs")
        problems += [f"{title} has no {key}" for key in ("doc_to_text", "doc_to_choice", "doc_to_target")
                     if not pairs and key not in options]
        metrics = ("pct_stereotype",) if pairs else ("acc", "acc_norm", "acc_mutual_info")
        if "metric_list" not in options and (metric := values.get("metric", "acc")) not in metrics:
            problems.append(f"{title} has the metric {metric!r}, expected {' or '.join(metrics)}")
        values["file"] = str(folder / str(values.get("file")))
        problems += [f"{title}: {values['file']} does not exist"] if not Path(values["file"]).is_file() else []
    if problems:
        raise UserError("; ".join(problems))
    return Benchmark(**values, options=options)


@functools.cache
def task_manager() -> TaskManager:
    """lm-eval's index of its tasks, cached because building it takes seconds."""
    return TaskManager()


def with_parts(benchmark: Benchmark) -> list[Benchmark]:
    """A benchmark, followed by one for each value of its field `by`."""
    if not benchmark.by or not benchmark.file:
        return [benchmark]
    values = {item.get(benchmark.by) for item in read_json_lines(benchmark.file)[benchmark.num_fewshot:]}
    if None in values:
        raise UserError(f"{benchmark.file}: an item has no {benchmark.by!r}, by which {benchmark.name} is divided")
    return [benchmark] + [
        dataclasses.replace(benchmark, name=re.sub(r"\W+", "_", f"{benchmark.name}_{value}"), label=str(value), by=None,
                            part_of=benchmark.name, where={benchmark.by: value}) for value in sorted(values, key=str)]


def load_suite(suite: list[Benchmark]) -> tuple[Loaded, dict[str, str]]:
    """Returns the loaded benchmarks, and {name: reason} for benchmarks whose datasets are not available.

    Raises UserError for benchmarks that lm-eval cannot run as the suite describes them.
    """
    loaded: Loaded = {}
    missing = {}
    for benchmark in suite:
        if benchmark.file:
            task = local_task(benchmark)
            loaded[benchmark.name] = task, [task]
            continue
        try:
            found = task_manager().load(benchmark.name)
        except Exception as error:  # of datasets, huggingface_hub or its HTTP library
            missing[benchmark.name] = first_line(error)
            if isinstance(error, ConnectionError):  # avoids retries of 20 s for each dataset that is not in the cache
                huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            continue
        tasks = list(found["tasks"].values())
        for task in tasks:
            task.set_config(key="num_fewshot", value=benchmark.num_fewshot)
        loaded[benchmark.name] = next(iter((found["groups"] or found["tasks"]).values())), tasks
    check_tasks(suite, loaded)
    return loaded, missing


def local_task(benchmark: Benchmark) -> ConfigurableTask:
    """The lm-eval task of a benchmark with a local file. Raises UserError if the file or an item is invalid."""
    assert benchmark.file, benchmark
    items = read_json_lines(benchmark.file)
    keys = dict.fromkeys(key for item in items for key in item)
    items = [{key: item.get(key) for key in keys} for item in items]
    examples, items = items[:benchmark.num_fewshot], items[benchmark.num_fewshot:]
    items = [item for item in items if all(item.get(key) == value for key, value in benchmark.where.items())]
    if not items:
        raise UserError(f"{benchmark.file} has no items for {benchmark.name}"
                        + (f" after its {len(examples)} few-shot examples" if examples else ""))
    config = {"task": benchmark.name, "test_split": "test", "output_type": "multiple_choice",
              "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
              "num_fewshot": benchmark.num_fewshot,
              "metric_list": [{"metric": name} for name in dict.fromkeys(("acc", "acc_norm", benchmark.metric))]}
    if examples:
        config["fewshot_config"] = {"sampler": "first_n", "samples": examples}
    if benchmark.pairs:
        config |= {"doc_to_text": "", "doc_to_target": 0, "target_delimiter": "",
                   "doc_to_choice": lambda item: [item["sent_more"], item["sent_less"]],
                   "process_results": lambda item, results: {"pct_stereotype": float(results[0][0] > results[1][0])},
                   "metric_list": [{"metric": "pct_stereotype", "aggregation": "mean", "higher_is_better": False}]}
    try:
        task = ConfigurableTask(config=config | benchmark.options)
        for item in [*examples, *items]:
            choices, target = task.doc_to_choice(item), task.doc_to_target(item)
            target = choices.index(target) if target in choices else target
            if not all(isinstance(choice, str) for choice in choices) or target not in range(len(choices)):
                raise ValueError(f"its choices are {choices!r} and the right one is {target!r}, expected texts and the "
                                 f"index of one, or one of them, in {json.dumps(item, ensure_ascii=False)[:200]}")
    except Exception as error:  # of templates, of fields that an item lacks
        raise UserError(f"{benchmark.file}: {benchmark.name} is not a valid task: {first_line(error)}") from error
    return task


def check_tasks(suite: list[Benchmark], loaded: Loaded) -> None:
    """Raises UserError for tags, for tasks in two benchmarks, and for metrics that a task does not have."""
    problems: list[str] = []
    owners: dict[str, str] = {}
    for benchmark in (benchmark for benchmark in suite if benchmark.name in loaded):
        root, tasks = loaded[benchmark.name]
        if len(tasks) > 1 and isinstance(root, ConfigurableTask):
            problems.append(f"{benchmark.name} is a tag, which has no results of its own: list its tasks, "
                            + ", ".join(task.task_name for task in tasks))
        for task in tasks:
            if (owner := owners.setdefault(task.task_name, benchmark.name)) != benchmark.name:
                problems.append(f"{task.task_name} is in both {owner} and {benchmark.name}: leave one out")
            if benchmark.metric.partition(",")[0] not in task.aggregation():
                problems.append(f"{task.task_name} has no metric {benchmark.metric!r}, expected one of "
                                + ", ".join(task.aggregation()))
    if problems:
        raise UserError("; ".join(problems))
