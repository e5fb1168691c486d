"""Files of evaluation results, written and read: metrics and predictions of tasks, results and samples of lm-eval."""
import datetime
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable

from common.files import UserError, read_json, read_json_lines, write_json, write_text

IGNORED = {"checkpoint", "commit"}  # the path of the checkpoint and the program's version do not change results


def is_same_run(recorded: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether the "run" in a results file names the same weights, data and settings as `run`."""
    run = json.loads(json.dumps(run))
    return all(recorded.get(key) == run.get(key) for key in (recorded.keys() | run.keys()) - IGNORED)


def task_files(folder: str | Path, task: str) -> tuple[Path, Path]:
    """Paths of a task's metrics-<task>.json and predictions-<task>.jsonl."""
    return Path(folder) / f"metrics-{task}.json", Path(folder) / f"predictions-{task}.jsonl"


def write_task_results(folder: str | Path, task: str, items: Iterable[dict], metrics: dict[str, dict[str, float]],
                       run: dict[str, Any]) -> dict[str, Any]:
    """Writes the predictions and then the metrics of a task. Returns the content of the metrics file.

    Each of `items` becomes a line of the predictions; its "scores" are {metric: value}. `metrics` are {metric: {"mean",
    "low", "high"}}. `run` holds the checkpoint, data and settings that the results depend on.
    """
    metrics_file, predictions_file = task_files(folder, task)
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    results = {"task": task, "samples": len(lines), "metrics": metrics, "run": run}
    write_text(predictions_file, "\n".join(lines) + "\n")
    write_json(metrics_file, results)
    return results


def read_task_results(folder: str | Path) -> list[dict[str, Any]]:
    """The contents of all metrics files in a folder, with "scores" added: {metric: its value for each item}.

    "scores" is empty if there are no predictions.
    """
    results = []
    for path in sorted(Path(folder).glob("metrics-*.json")):
        found = {"run": {}} | read_json(path)
        predictions = task_files(folder, found["task"])[1]
        scores = [line.get("scores", {}) for line in read_json_lines(predictions)] if predictions.exists() else []
        names = scores[0] if scores else ()
        results.append(found | {"scores": {name: [item.get(name) for item in scores] for name in names}})
    return results


@dataclass(frozen=True)
class ResultsFile:
    """Content of a results file of lm-eval and of its sample files."""
    results: dict[str, dict[str, Any]]  # task or group -> {"metric,filter": value}
    groups: dict[str, list[str]]  # lm-eval's "group_subtasks"
    run: dict[str, Any]  # what evaluate.py adds; empty in other results
    samples: dict[str, list[dict[str, Any]]]  # task -> its items, if their file exists

    def items(self, name: str, metric: str) -> list:
        """The values of a metric for each item of a task, or of all tasks of a group."""
        if children := self.groups.get(name):
            return [value for child in children for value in self.items(child, metric)]
        return [sample.get(metric) for sample in self.samples.get(name, ())]


def write_results(directory: Path, results: dict[str, Any], samples: Mapping[str, Iterable[dict]]) -> None:
    """Writes results_<date>.json and samples_<task>_<date>.jsonl as lm-eval does, without the prompts."""
    date = datetime.datetime.now().isoformat().replace(":", "-")
    dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
    for task, items in samples.items():
        lines = [dump({key: value for key, value in item.items() if key not in ("doc", "arguments", "resps")})
                 for item in items]
        write_text(directory / f"samples_{task}_{date}.jsonl", "\n".join(lines) + "\n")
    write_text(directory / f"results_{date}.json", dump(results, indent=2) + "\n")


def read_results_file(path: Path) -> ResultsFile:
    """The content of a results file. Raises UserError if it is not one."""
    content = read_json(path)
    if not isinstance(content.get("results"), dict):
        raise UserError(f"{path} is not a results file of lm-eval: it has no \"results\"")
    samples = {task: read_json_lines(file) for task, file in sample_files(path).items()}
    return ResultsFile(content["results"], content.get("group_subtasks", {}), content.get("run", {}), samples)


def sample_files(path: Path) -> dict[str, Path]:
    """The sample file of each task in a results file."""
    ending = f"_{path.stem.removeprefix('results_')}.jsonl"
    return {file.name.removeprefix("samples_").removesuffix(ending): file
            for file in sorted(path.parent.glob(f"samples_*{ending}"))}


def metric_value(entry: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """(value, standard error) of a metric in a results entry, None if it is missing. An unknown error is NaN.

    metric: a name such as "acc", or a name and a filter such as "exact_match,strict". Keys of lm-eval 0.4, such as
    "acc,none", and of earlier versions ("acc") are read.
    """
    name, _, filter_name = metric.partition(",")
    for ending in (f",{filter_name or 'none'}", ""):
        value, error = entry.get(name + ending), entry.get(f"{name}_stderr{ending}")
        if isinstance(value, int | float):
            return float(value), float(error) if isinstance(error, int | float) else math.nan
    return None
