"""Benchmarks of a suite as lm-eval tasks."""
import contextlib
import dataclasses
import functools
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import huggingface_hub
import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from common.configs import ROOT
from common.files import UserError, first_line, read_json_lines
from common.settings import Resolved
from evaluation.harness import check_room, generation_settings
from evaluation.suites import Benchmark, open_suite

# name of a benchmark -> (the task or group that simple_evaluate takes, all tasks in it)
Loaded = dict[str, tuple[Any, list[ConfigurableTask]]]

# lm-eval's keys for local files, and the types of their values. Items with `pairs` have texts of their own.
OPTIONS: dict[str, tuple[type, ...]] = {
    "doc_to_text": (str,), "doc_to_choice": (str, list), "doc_to_target": (str, int), "description": (str,),
    "target_delimiter": (str,), "fewshot_delimiter": (str,), "gen_prefix": (str,)}

METRICS = ("acc", "acc_norm", "acc_mutual_info")  # of local files without `pairs`
NOT_SHARES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "bleu", "chrf", "ter")
MAX_NAME_BYTES = 200  # file systems allow 255 for samples_<name>_<date>.jsonl


def read_suite(name: str, folder: str | Path | None = None) -> list[Benchmark]:
    """The benchmarks of a suite, parts included (see suites.open_suite).

    Raises UserError with all problems of the suite, or for invalid items in its local files.
    """
    path, entries, folder = open_suite(name, folder)
    benchmarks, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            benchmarks.append(parse_benchmark(entry, f"[[benchmark]] {entry.get('name', number)!s:.80}", folder))
        except UserError as error:
            problems.append(str(error))
    if not problems:
        if unknown := [b.name for b in benchmarks if not b.file and b.name not in task_manager().all_tasks]:
            problems.append(f"lm-eval {lm_eval.__version__} has no task {', '.join(unknown)}")
        benchmarks = [part for benchmark in benchmarks for part in with_parts(benchmark)]
        names = [benchmark.name for benchmark in benchmarks]
        problems += [f"{name} is listed twice" for name in sorted(set(names)) if names.count(name) > 1]
        problems += [problem for name in names for problem in name_problems(name)]
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
    problems += [f"{title}: unknown key {key!r}, expected {', '.join(sorted({*fields, *OPTIONS}))}"
                 for key in options if key not in OPTIONS]
    problems += [f"{title}: {key} is {value!r:.80}, expected text" for key, value in options.items()
                 if type(value) not in OPTIONS.get(key, (type(value),))]
    problems += [f"{title}: num_fewshot is below 0"] if values.get("num_fewshot", 0) < 0 else []
    problems += [f"{title} needs both published_name and published_metric"] if \
        ("published_name" in entry) != ("published_metric" in entry) else []
    if "file" not in entry:
        if local := {"pairs", "by", "make_file"} & entry.keys() | options.keys():
            problems.append(f"{title}: {', '.join(sorted(local))} needs a file; tasks of lm-eval have their own")
    else:
        pairs = values.get("pairs")
        problems += [f"{title} has no {key}" for key in ("doc_to_text", "doc_to_choice", "doc_to_target")
                     if not pairs and key not in options]
        problems += [f"{title}: {', '.join(options)} cannot be used with pairs"] if pairs and options else []
        metrics = ("pct_stereotype",) if pairs else METRICS
        if (metric := values.get("metric", "acc")) not in metrics:
            problems.append(f"{title} has the metric {metric!r}, expected {' or '.join(metrics)}")
        if "file" in values:
            values["file"] = str(folder / values["file"])
            if not Path(values["file"]).is_file() and not values.get("make_file"):
                problems.append(f"{title}: {values['file']} does not exist")
    if problems:
        raise UserError("; ".join(problems))
    return Benchmark(**values, options=options)


def name_problems(name: str) -> list[str]:
    """A list with the sentence that rejects a name of a benchmark, which becomes part of file names; else empty."""
    if name and name.isprintable() and name[0] != "." and not {"/", "\\"} & set(name) and \
            len(name.encode()) <= MAX_NAME_BYTES:
        return []
    return [f"{name!r:.80} is not a name of a benchmark: expected at most {MAX_NAME_BYTES} bytes of text without "
            "slashes, control characters or a dot at the beginning"]


@functools.cache
def task_manager() -> TaskManager:
    """lm-eval's index of its tasks, cached because building it takes seconds."""
    return TaskManager()


def with_parts(benchmark: Benchmark) -> list[Benchmark]:
    """A benchmark, followed by one for each value of its field `by`."""
    if not benchmark.by or not benchmark.file or not Path(benchmark.file).is_file():
        return [benchmark]
    values = [item.get(benchmark.by) for item in read_json_lines(benchmark.file)[benchmark.num_fewshot:]]
    if wrong := [value for value in values if not isinstance(value, str | int | float)]:
        raise UserError(f"{benchmark.file}: an item has no {benchmark.by!r}, by which {benchmark.name} is divided, "
                        f"or it is neither text nor a number: {wrong[0]!r:.80}")
    parts: dict[str, Benchmark] = {}
    for value in sorted(set(values), key=str):
        name = re.sub(r"\W+", "_", f"{benchmark.name}_{value}")
        if name in parts:
            raise UserError(f"{benchmark.file}: the values {parts[name].label!r} and {str(value)!r} of "
                            f"{benchmark.by!r} both make the name {name}: rename one of them")
        parts[name] = dataclasses.replace(benchmark, name=name, label=str(value), by=None, part_of=benchmark.name,
                                          where={benchmark.by: value})
    return [benchmark, *parts.values()]


class EvaluateLibrary:
    """Within the block, `import evaluate` is the library of this name, which some tasks of lm-eval import, instead of
    this project's script. A finder for `sys.meta_path`."""

    def __init__(self) -> None:
        self.library: ModuleType | None = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The library, where the project's folder comes first in sys.path."""
        folders = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]
        return PathFinder.find_spec(name, folders) if name == "evaluate" else None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        script = sys.modules.pop("evaluate", None)
        if self.library:
            sys.modules["evaluate"] = self.library
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            self.library = sys.modules.pop("evaluate", None)
            if script:
                sys.modules["evaluate"] = script


evaluate_library = EvaluateLibrary()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences lm-eval within the block, and datasets and huggingface_hub from then on. lm-eval's progress bar is
    shown on a terminal only."""
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, desc="building requests", leave=False, disable=None)
    with warnings.catch_warnings(), evaluate_library():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            lm_eval.api.task.tqdm = bar


def load_suite(suite: list[Benchmark], max_length: int) -> tuple[Loaded, dict[str, str]]:
    """Returns the loaded benchmarks, and {name: reason} for benchmarks whose datasets are not available.

    max_length: the model's context. Raises UserError for benchmarks that cannot be run as the suite describes them.
    """
    loaded: Loaded = {}
    missing = {}
    for benchmark in suite:
        if benchmark.file and not Path(benchmark.file).is_file():
            missing[benchmark.name] = f"{benchmark.file} does not exist: {benchmark.make_file}"
            continue
        if benchmark.file:
            task = local_task(benchmark)
            loaded[benchmark.name] = task, [task]
            continue
        try:
            found = task_manager().load(benchmark.name)
        except ImportError as error:
            raise UserError(f"{benchmark.name} needs a Python package: {error}. Install it, or leave the benchmark "
                            "out") from None
        except Exception as error:  # of datasets, huggingface_hub or its HTTP library
            missing[benchmark.name] = first_line(error)
            if isinstance(error, ConnectionError):  # avoids retries of 20 s for each dataset that is not in the cache
                huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            continue
        tasks = list(found["tasks"].values())
        for task in tasks:
            task.set_config(key="num_fewshot", value=benchmark.num_fewshot)
        loaded[benchmark.name] = next(iter((found["groups"] or found["tasks"]).values())), tasks
    check_tasks(suite, loaded, max_length)
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
        task = ConfigurableTask(config=config | benchmark.options)  # tries the first item
    except Exception as error:
        raise UserError(f"{benchmark.file}: {benchmark.name} is not a valid task: {first_line(error)}, with its first "
                        f"item {json.dumps(items[0], ensure_ascii=False)[:200]}") from error
    try:
        environment = lm_eval.utils.env.overlay(finalize=not_null)
        templates = [environment.from_string(text) for text in benchmark.options.values() if isinstance(text, str)]
        for item in [*examples, *items]:
            for template in templates:
                template.render(**item)
            if wrong := benchmark_item_problem(task, item):
                raise ValueError(f"{wrong}, in {json.dumps(item, ensure_ascii=False)[:200]}")
        build_first_request(task)
    except Exception as error:  # of templates, of fields that an item lacks
        raise UserError(f"{benchmark.file}: {benchmark.name} is not a valid task: {first_line(error)}") from error
    return task


def not_null(value: Any) -> Any:
    """A value that a template prints. Raises ValueError for null, which would become the text "None"."""
    if value is None:
        raise ValueError("a field that its template prints is null or missing in an item")
    return value


def benchmark_item_problem(task: ConfigurableTask, item: dict[str, Any]) -> str:
    """The problem of an item of a multiple-choice task, as a clause; empty if it is valid."""
    context, choices, target = task.doc_to_text(item), task.doc_to_choice(item), task.doc_to_target(item)
    target = choices.index(target) if target in choices else target
    if not isinstance(context, str):
        return f"its context is {context!r:.80}, expected text"
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices) or \
            not isinstance(target, int) or target not in range(len(choices)):
        return f"its choices are {choices!r:.100} and the right one is {target!r:.40}, expected two or more " \
               "texts and the index of one, or one of them"
    return ""


def build_first_request(task: Any, max_length: int | None = None) -> None:
    """Builds the request of a task's first item as simple_evaluate does, to find problems of the task."""
    task.set_fewshot_seed(0)  # simple_evaluate sets its own
    task.build_all_requests(limit=1)
    for request in task.instances:
        if request.request_type == "generate_until":
            check_room(generation_settings(request.args[1])[0], max_length)


def check_tasks(suite: list[Benchmark], loaded: Loaded, max_length: int) -> None:
    """Raises UserError for tags, for tasks in two benchmarks, for metrics that a task or a group does not have, and for
    tasks that cannot run here."""
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
            problems += metric_problems(task, benchmark.metric)
            problems += name_problems(task.task_name) + task_problems(task, max_length)
        means = [mean.metric for mean in root.aggregate_metric_list or []] if isinstance(root, Group) else []
        if isinstance(root, Group) and benchmark.metric.partition(",")[0] not in means:
            problems.append(f"the group {benchmark.name} has no mean of {benchmark.metric!r} over its tasks"
                            + (f", expected one of {', '.join(means)}" if means else ": list its tasks"))
    if problems:
        raise UserError("; ".join(problems))


def metric_problems(task: Any, metric: str) -> list[str]:
    """A list with the sentence that rejects a metric, which may name a filter: acc, or exact_match,strict-match."""
    name, _, given = metric.partition(",")
    if name not in task.aggregation():
        return [f"{task.task_name} has no metric {metric!r}, expected one of {', '.join(task.aggregation())}"]
    if name in NOT_SHARES:
        return [f"{task.task_name}: {name} is not a share; reports show shares in percent: choose another metric"]
    filters = [one.name for one in getattr(task, "_filters", [])] or ["none"]
    return [] if (given or "none") in filters else [
        f"{task.task_name} has the metric {name} with the filters {', '.join(filters)}: give {name},{filters[0]}"]


def task_problems(task: Any, max_length: int) -> list[str]:
    """A list with the sentence that rejects a task that cannot run here; empty if it can."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        return [f"{task.task_name} runs code that a model has written, or has images or sound: not supported"]
    try:
        build_first_request(task, max_length)
    except Exception as error:  # of lm-eval: few-shot examples that are not there, generation settings
        return [f"{task.task_name} cannot be run: {first_line(error)}"]
    return []
