"""Benchmarks of a suite as lm-eval tasks."""
import dataclasses
import functools
import json
import re
from pathlib import Path

import datasets
import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from common.files import UserError, first_line, read_json_lines
from common.settings import Resolved
from evaluation.suites import Benchmark, open_suite


def read_suite(name, folder=None):
    """The benchmarks of a suite (see suites.open_suite). One UserError lists everything that is wrong with them."""
    path, entries, folder = open_suite(name, folder)
    problems = []
    found = [read_benchmark(entry, f"[[benchmark]] {entry.get('name', number)}", folder, problems)
             for number, entry in enumerate(entries, 1)]
    if not problems:
        if unknown := [b.name for b in found if not b.file and b.name not in task_manager().all_tasks]:
            problems.append(f"lm-eval {lm_eval.__version__} knows no task {', '.join(unknown)}")
        found = [part for benchmark in found for part in expand(benchmark)]
        names = [benchmark.name for benchmark in found]
        problems += [f"{name} stands there twice" for name in sorted(set(names)) if names.count(name) > 1]
        problems += [f"{b.name} is part of {b.part_of}, which does not stand there" for b in found
                     if b.part_of and b.part_of not in names]
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return found


def read_benchmark(entry, title, folder, problems):
    """The Benchmark of an entry of a suite; what is wrong with it is added to `problems`, and then there is None."""
    fields = {entry.name: entry for entry in dataclasses.fields(Benchmark) if entry.name not in ("where", "options")}
    options = {key: value for key, value in entry.items() if key not in fields}
    wrong = [f"{title} has no {key}" for key in ("name", "category") if key not in entry]
    found = Resolved(Benchmark)
    found.update({key: value for key, value in entry.items() if key in fields}, title)
    values, wrong = found.values, wrong + found.problems
    wrong += [f"{title}: unknown key {key!r}" for key in options if key not in lm_eval_keys()]
    wrong += [f"{title}: num_fewshot is below 0"] if values.get("num_fewshot", 0) < 0 else []
    if "file" not in entry:
        if local := {"pairs", "by"} & entry.keys() | options.keys():
            wrong.append(f"{title}: {', '.join(sorted(local))} needs a file; tasks of lm-eval have their own")
    else:
        pairs = values.get("pairs")
        wrong += [f"{title} has no {key}" for key in ("doc_to_text", "doc_to_choice", "doc_to_target")
                  if not pairs and key not in options]
        metrics = ("pct_stereotype",) if pairs else ("acc", "acc_norm", "acc_mutual_info")
        if "metric_list" not in options and (metric := values.get("metric", "acc")) not in metrics:
            wrong.append(f"{title} has the metric {metric!r}, expected {' or '.join(metrics)}")
        values["file"] = str(folder / str(values.get("file")))
        wrong += [f"{title}: {values['file']} does not exist"] if not Path(values["file"]).is_file() else []
    problems += wrong
    return None if wrong else Benchmark(**values, options=options)


@functools.cache
def task_manager():
    """lm-eval's index of its tasks, which takes seconds to make."""
    return TaskManager()


def lm_eval_keys():
    """The keys of lm-eval's task configuration."""
    return {entry.name for entry in dataclasses.fields(lm_eval.config.task.TaskConfig)}


def expand(benchmark):
    """A benchmark and, with `by`, those of its parts."""
    if not benchmark.by:
        return [benchmark]
    values = {item.get(benchmark.by) for item in read_json_lines(benchmark.file)[benchmark.num_fewshot:]}
    if None in values:
        raise UserError(f"{benchmark.file}: an item has no {benchmark.by!r}, by which {benchmark.name} is parted")
    return [benchmark] + [
        dataclasses.replace(benchmark, name=re.sub(r"\W+", "_", f"{benchmark.name}_{value}"), label=str(value), by=None,
                            part_of=benchmark.name, where={benchmark.by: value}) for value in sorted(values, key=str)]


def local_task(benchmark):
    """The lm-eval task of a benchmark with a local file. Raises UserError where an item has no right choice."""
    items = read_json_lines(benchmark.file)
    keys = dict.fromkeys(key for item in items for key in item)
    items = [{key: item.get(key) for key in keys} for item in items]
    examples, items = items[:benchmark.num_fewshot], items[benchmark.num_fewshot:]
    items = [item for item in items if all(item.get(key) == value for key, value in benchmark.where.items())]
    if not items:
        raise UserError(f"{benchmark.file} holds no item for {benchmark.name}"
                        + (f" beside its {len(examples)} examples" if examples else ""))
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
            choices, right = task.doc_to_choice(item), task.doc_to_target(item)
            right = choices.index(right) if right in choices else right
            if not all(isinstance(choice, str) for choice in choices) or right not in range(len(choices)):
                raise ValueError(f"its choices are {choices!r} and the right one is {right!r}, expected texts and the "
                                 f"index of one, or one of them, in {json.dumps(item, ensure_ascii=False)[:200]}")
    except Exception as error:  # of templates, of fields that an item lacks
        raise UserError(f"{benchmark.file}: {benchmark.name} makes no task: {first_line(error)}") from error
    return task


def check_tasks(suite, loaded):
    """Raises a UserError for what lm-eval would run, but not as the suite means it."""
    problems, seen = [], {}
    for benchmark in (benchmark for benchmark in suite if benchmark.name in loaded):
        tasks = leaves(loaded[benchmark.name])
        if len(tasks) > 1 and not loaded[benchmark.name]["groups"]:
            problems.append(f"{benchmark.name} is a tag without figures of its own: name its tasks, "
                            + ", ".join(task.task_name for task in tasks))
        for task in tasks:
            if (other := seen.setdefault(task.task_name, benchmark.name)) != benchmark.name:
                problems.append(f"{task.task_name} is in both {other} and {benchmark.name}: leave one out")
            if benchmark.metric.partition(",")[0] not in task.aggregation():
                problems.append(f"{task.task_name} has no metric {benchmark.metric!r}, expected one of "
                                + ", ".join(task.aggregation()))
    if problems:
        raise UserError("; ".join(problems))


def leaves(built):
    """The tasks of what lm-eval built: of one task, a group or a tag."""
    return [built] if isinstance(built, ConfigurableTask) else list(built["tasks"].values())
