"""Files of evaluation results, written and read: losses, metrics and predictions of tasks, lm-eval's results and
samples."""
import datetime
import glob
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import JSON_NAMES, UserError, is_number, parsing, read_json, read_json_lines, walk
from common.provenance import wrong_types
from common.writing import write_text

# Bounds of metrics that are checked. Other metrics may have any finite value.
MAX, ROUNDING = 1e300, 1e-6
BOUNDS = dict.fromkeys(("acc", "acc_norm", "acc_mutual_info", "exact_match", "mrr", "pct_stereotype", "r@1", "r@2",
                        "ece", "prompt_level_strict_acc"), (0.0, 1.0)) | {
                            "nll": (0.0, MAX), "bits_per_byte": (0.0, MAX), "brier": (0.0, 2.0)}
PERCENTAGES = dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL", "sari", "sari_hf", "empty", "copied"), (0.0, 100.0))

SUITE_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str, "category": str, "metric": str, "label": (str, type(None)), "part_of": (str, type(None)),
    "file": (str, type(None))}  # of the entries that are read again

MISSING = "missing.json"  # the benchmarks of a suite whose datasets were not available, and why

IGNORED = {"checkpoint", "commit"}  # the path of the checkpoint and the program's version do not change results


@contextmanager
def earlier_results() -> Iterator[None]:
    """Adds to a UserError about a file of earlier results what can be done about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}: remove this file, or choose another --out") from None


def is_same_run(recorded: Any, run: dict[str, Any]) -> bool:
    """Whether the "run" in a results file names the same weights, data and settings as `run`. A setting that is off
    is the same as one that is missing."""
    run = json.loads(json.dumps(run))
    return isinstance(recorded, dict) and all((recorded.get(key) or None) == (run.get(key) or None)
                                              for key in (recorded.keys() | run.keys()) - IGNORED)


def task_files(folder: str | Path, task: str) -> tuple[Path, Path]:
    """Paths of a task's metrics-<task>.json and predictions-<task>.jsonl."""
    return Path(folder) / f"metrics-{task}.json", Path(folder) / f"predictions-{task}.jsonl"


def write_task_results(folder: str | Path, task: str, items: Sequence[dict], metrics: dict[str, dict[str, float]],
                       run: dict[str, Any]) -> dict[str, Any]:
    """Writes the predictions and then the metrics of a task. Returns the content of the metrics file.

    Each of `items` becomes a line of the predictions; its "scores" are {metric: value}. `metrics` are {metric: {"mean",
    "low", "high"}}. `run` holds the checkpoint, data and settings that the results depend on. The metrics file also has
    "prompts", the number of items by prompt.
    """
    metrics_file, predictions_file = task_files(folder, task)
    lines = [finite_json(item, predictions_file) for item in items]
    prompts = Counter(str(item["src_info"].get("prompt_name", "")) for item in items)
    results = {"task": task, "samples": len(lines), "prompts": prompts, "metrics": metrics, "run": run}
    text = finite_json(results, metrics_file, indent=1)
    write_text(predictions_file, "\n".join(lines) + "\n")
    write_text(metrics_file, text + "\n")
    return results


def finite_json(value: Any, path: Path, default: Callable[[Any], Any] | None = None, indent: int | None = None) -> str:
    """A value as JSON. Raises UserError if it holds numbers that are not finite, which no results file may."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=default, indent=indent)
    except ValueError:
        raise UserError(f"{path} was not written: the results hold numbers that are not finite (NaN or infinite)") \
            from None


def read_task_results(folder: str | Path) -> list[dict[str, Any]]:
    """The contents of all metrics files in a folder, with "scores" added: {metric: its value for each item}.

    "scores" is empty if there are no predictions. Raises UserError if a file is damaged.
    """
    results = []
    for path in sorted(Path(folder).glob("metrics-*.json")):
        found = {"task": None, "metrics": None, "run": {}} | read_json(path, dict)
        with parsing(path, "a metrics file of evaluate.py"):
            check_task_results(found, path)
        predictions = task_files(folder, found["task"])[1]
        lines = read_json_lines(predictions) if predictions.exists() else []
        if lines and len(lines) != (samples := found.get("samples", len(lines))):
            raise UserError(f"{predictions} has {len(lines)} samples and {path} is of {samples}: remove both, and "
                            "evaluate the checkpoint again")
        with parsing(predictions, "a predictions file of evaluate.py"):
            scores = [dict(line.get("scores", {})) for line in lines]
        names = scores[0] if scores else ()
        results.append(found | {"scores": {name: [item.get(name) for item in scores] for name in names}})
    return results


def check_task_results(results: dict[str, Any], path: Path) -> None:
    """Raises an error if the content of a metrics file is not valid."""
    wrong = wrong_types(results, {"task": str, "samples": int, "metrics": dict, "run": dict})
    if wrong := wrong or wrong_types(results["run"], {"decoding": dict}):
        raise UserError(f"{path} is damaged or not a metrics file of evaluate.py: its entry {wrong[0]!r} is not valid")
    for name, interval in results["metrics"].items():
        mean, low, high = (interval[key] for key in ("mean", "low", "high"))
        check_number(mean, *PERCENTAGES.get(name, (-MAX, MAX)), f"{path}: the mean of {name}")
        check_number(low, -MAX, MAX, f"{path}: the lower bound of {name}")
        check_number(high, low, MAX, f"{path}: the upper bound of {name}")


def losses_file(folder: str | Path, name: str, kind: str) -> Path:
    """Path of losses-text.json (name "text", kind "text") or of a task's losses-task-<task>.json (kind "task")."""
    return Path(folder) / (f"losses-{kind}.json" if kind == "text" else f"losses-{kind}-{name}.json")


def total_losses(items: dict[str, Any]) -> dict[str, float | None]:
    """Returns {"loss", "bits_per_byte", "kl"} of all items: nats per token, bits per byte, nats per token or None."""
    nll, tokens, kl = sum(items["nll"]), sum(items["tokens"]), items["kl"]
    return {"loss": nll / tokens, "bits_per_byte": nll / math.log(2) / sum(items["bytes"]),
            "kl": None if kl is None else sum(kl) / tokens}


def write_losses(folder: str | Path, name: str, kind: str, items: dict[str, Any],
                 run: dict[str, Any]) -> dict[str, Any]:
    """Writes the losses of a text or a task. Returns the content of the file.

    items: the lists "nll" and "kl" (nats, sums over the tokens of each item; "kl" may be None), "tokens" and "bytes".
    `run` holds the checkpoint, data and settings that the losses depend on. Raises UserError, and writes nothing, if a
    number is not finite.
    """
    path = losses_file(folder, name, kind)
    results = {"name": name, "kind": kind, "samples": len(items["nll"])} | total_losses(items)
    text = finite_json(results | {"items": items, "run": run}, path)
    write_text(path, text + "\n")
    return results | {"items": items, "run": run}


def read_losses(folder: str | Path) -> list[dict[str, Any]]:
    """The contents of all losses files in a folder, see `write_losses`. Raises UserError if one is damaged."""
    return [read_losses_file(path) for path in sorted(Path(folder).glob("losses-*.json"))]


def read_losses_file(path: Path) -> dict[str, Any]:
    """The content of a losses file. Raises UserError if a value is not valid, or a total not that of the items."""
    types: dict[str, type | tuple[type, ...]] = {"name": str, "kind": str, "samples": int, "items": dict, "run": dict}
    found = dict.fromkeys(types) | read_json(path, dict)
    with parsing(path, "a losses file of evaluate.py"):
        if wrong := wrong_types(found, types):
            raise UserError(f"{path} is damaged or not a losses file of evaluate.py: its entry {wrong[0]!r} is not "
                            "valid")
        if losses_file(path.parent, found["name"], found["kind"]) != path:
            raise UserError(f"{path} holds the losses of {found['kind']} {found['name']!r}: it was renamed")
        items = found["items"]
        for name, low in (("nll", 0.0), ("tokens", 1.0), ("bytes", 0.0), ("kl", 0.0)):
            if name == "kl" and items[name] is None:
                continue
            if len(items[name]) != found["samples"]:
                raise UserError(f"{path} has {len(items[name])} values of {name} for {found['samples']} items")
            for number, value in enumerate(items[name]):
                check_number(value, low, MAX, f"{path}: {name} of item {number}")
        for name, total in total_losses(items).items():
            if (found[name] is None) != (total is None) or total is not None and not math.isclose(
                    found[name], total, abs_tol=ROUNDING):
                raise UserError(f"{path}: {name} is {json.dumps(found[name]):.40}, but that of the items is {total}")
    return found


def tasks_of(groups: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """A task itself, or all tasks of a group and its groups, in order of their names. groups: of a results file."""
    children = groups.get(name)
    return sorted(task for child in children for task in tasks_of(groups, child)) if children else [name]


@dataclass(frozen=True)
class ResultsFile:
    """Content of a results file of lm-eval and of its sample files."""
    path: Path
    content: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]  # task -> its items, if their file exists

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """{task or group: {"metric,filter": value}}."""
        return self.content["results"]

    @property
    def groups(self) -> dict[str, list[str]]:
        """{group: its tasks and groups}."""
        return self.content.get("group_subtasks", {})

    @property
    def run(self) -> dict[str, Any]:
        """The entry `run`, which evaluate.py adds; empty in other results."""
        return self.content.get("run", {})

    @property
    def suite(self) -> list[dict[str, Any]]:
        """The entries of the suite that evaluate.py ran."""
        return self.run.get("suite", [])

    def items(self, name: str, metric: str) -> list:
        """The values of a metric for each item of a task, or of all tasks of a group, in order of the items.

        metric: see metric_value. Files of samples repeat each item for each filter of the task, and with several
        processes the items are not in order.
        """
        metric, _, filter_name = metric.partition(",")
        items = []
        for task in tasks_of(self.groups, name):
            samples = [sample for sample in self.samples.get(task, ())
                       if sample.get("filter") in (None, filter_name or "none")]
            items += [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample.get("doc_id", 0))]
        return items


def write_results(directory: Path, results: dict[str, Any], samples: Mapping[str, Iterable[dict]]) -> None:
    """Writes results_<date>.json and samples_<task>_<date>.jsonl as lm-eval does, without the prompts.

    Raises UserError, and writes nothing, if a number is not finite.
    """
    from lm_eval.utils import handle_non_serializable  # lm-eval takes seconds to import
    date = date_of_results(directory)
    path = directory / f"results_{date}.json"
    files = {directory / f"samples_{task}_{date}.jsonl": "\n".join(
        finite_json({key: value for key, value in item.items() if key not in ("doc", "arguments", "resps")}, path,
                    handle_non_serializable) for item in items) for task, items in samples.items()}
    files[path] = finite_json(results, path, handle_non_serializable, indent=2)
    for file, text in files.items():
        write_text(file, text + "\n")


def date_of_results(directory: Path) -> str:
    """The date in the names of new results files: the time in UTC, or, if a file in the directory has a later one, such
    as in the time of another zone, the next microsecond. Files are therefore named in the order in which they are
    written, and the last one holds the newest results."""
    dates = [datetime.datetime.now(datetime.UTC).replace(tzinfo=None)]
    for path in directory.glob("results_*.json"):
        date, _, time = path.stem.removeprefix("results_").partition("T")
        with suppress(ValueError, OverflowError):  # the name of another program's file
            named = datetime.datetime.fromisoformat(f"{date}T{time.replace('-', ':')}").replace(tzinfo=None)
            # a name without a fraction of a second, such as 12-00-00.json, comes after those with one
            dates.append(named + datetime.timedelta(seconds=not named.microsecond, microseconds=1))
    return max(dates).isoformat(timespec="microseconds").replace(":", "-")


def results_files(folder: Path) -> list[Path]:
    """The results files in a folder and the folders in it, in order of their names, which begin with their dates.

    lm-eval has written results_<date>.json, and results.json into a folder that may itself be called *.json.
    """
    found = walk(folder, hidden=True) if folder.is_dir() else ()  # lm-eval calls the folder of ./my/m0 .__my__m0
    return sorted(root / name for root, _, names in found for name in names
                  if name.startswith("results") and name.endswith(".json") and (root / name).is_file())


def read_results_file(path: Path) -> ResultsFile:
    """The content of a results file. Raises UserError if it is not one, or if a value in it is not valid."""
    content = read_json(path, dict)
    if not isinstance(content.get("results"), dict):
        raise UserError(f"{path} is not a results file of lm-eval: it has no \"results\"")
    with parsing(path, "a results file of lm-eval"):
        for name, entry in content["results"].items():
            if not isinstance(entry, dict):
                raise UserError(f"{path}: the result of {name} is {JSON_NAMES[type(entry)]}, expected an object")
            check_metric_values(entry, f"{path}: {name}")
        samples = {}
        for task, sample_file in sample_files(path).items():
            samples[task] = read_json_lines(sample_file)
            for number, item in enumerate(samples[task], 1):
                # lm-eval's perplexities are lists, [log-likelihood, bytes]
                checked = {name: item[name] for name in BOUNDS.keys() & item.keys()
                           if not isinstance(item[name], bool | list)}
                check_metric_values(checked, f"{sample_file}, line {number}")
        file = ResultsFile(path, content, samples)
        for entry in file.suite:
            if wrong := wrong_types(entry, SUITE_TYPES):
                raise UserError(f"{path}: {wrong[0]} is not valid in an entry of its suite: {entry!s:.200}")
        for name in content["results"]:
            tasks_of(file.groups, name)  # raises an error if a group contains itself
    return file


def sample_files(path: Path) -> dict[str, Path]:
    """The sample file of each task in a results file."""
    ending = f"_{path.stem.removeprefix('results_')}.jsonl"
    return {file.name.removeprefix("samples_").removesuffix(ending): file
            for file in sorted(path.parent.glob(f"samples_*{glob.escape(ending)}"))}


def check_metric_values(entry: dict[str, Any], where: str) -> None:
    """Raises UserError, which begins with `where`, if a metric or standard error in a results entry is not valid.

    lm-eval writes an unknown value as the text "N/A".
    """
    for key, value in entry.items():
        name = key.partition(",")[0]
        low, high = (0.0, MAX) if name.endswith("_stderr") else BOUNDS.get(name, (-MAX, MAX))
        checked = name.endswith("_stderr") or name in BOUNDS
        if value not in (None, "N/A", "") and (checked or is_number(value)):
            check_number(value, low, high, f"{where}: {key}")


def check_number(value: Any, low: float, high: float, where: str) -> None:
    """Raises UserError, which begins with `where`, if a JSON value is not a number from `low` to `high`."""
    if not is_number(value) or not low - ROUNDING <= value <= high + ROUNDING:
        bounded = f"a number from {low:g} to {high:g}" if high < MAX else f"at least {low:g}"
        expected = bounded if low > -MAX else "a number"
        raise UserError(f"{where} is {json.dumps(value):.40}, expected {expected}")


def metric_value(entry: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """(value, standard error) of a metric in a results entry, None if it is missing. An unknown error is NaN.

    metric: a name such as "acc", or a name and a filter such as "exact_match,strict". Keys of lm-eval 0.4, such as
    "acc,none", and of earlier versions ("acc") are read.
    """
    name, _, filter_name = metric.partition(",")
    for ending in (f",{filter_name or 'none'}", ""):
        value, error = entry.get(name + ending, "N/A"), entry.get(f"{name}_stderr{ending}", "N/A")
        if is_number(value):
            return float(value), float(error) if is_number(error) else math.nan
    return None
