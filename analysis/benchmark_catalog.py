"""The measured benchmarks, their descriptions in the suites, and the metric of each task."""
import functools
from collections.abc import Sequence
from typing import Any

from analysis.stages import BENCHMARKS, Stage
from common.configs import known, read_config
from evaluation.suites import Benchmark, open_suite


def find_benchmarks(stages: Sequence[Stage]) -> list[Benchmark]:
    """The benchmarks that were measured, in the order of the suites."""
    described = {name: benchmark for stage in stages for name, benchmark in stage.described.items()}
    catalog = described | shipped_benchmarks() | described  # the described ones come first and have precedence
    metrics = {name: stage.conditions[BENCHMARKS, name]["metric"] for stage in stages for name in stage.benchmarks}
    return [catalog[name] for name in catalog if name in metrics] + [
        Benchmark(name, "other", metric) for name, metric in metrics.items() if name not in catalog]


@functools.cache
def shipped_benchmarks() -> dict[str, Benchmark]:
    """The benchmarks of the suites in configs/eval, by name, those of published results included. `paper` has
    precedence: it uses lm-eval's own tasks."""
    found: dict[str, Benchmark] = {}
    for name in sorted(known("eval"), key=lambda name: name != "paper"):
        for entry in open_suite(name)[1]:
            found.setdefault(entry["name"], benchmark_of(entry))
            if "published_name" in entry:
                found.setdefault(entry["published_name"], Benchmark(
                    entry["published_name"], entry["category"], entry["published_metric"]))
    return found


def benchmark_of(entry: dict[str, Any]) -> Benchmark:
    """The Benchmark of a suite's entry, with the fields that a report needs."""
    needed = "name", "category", "metric", "label", "part_of", "published_version"
    return Benchmark(**{key: entry[key] for key in needed if key in entry})


def task_metric(task: str) -> str:
    """The metric that a task is judged by."""
    return read_config("task", task).get("measure", "rougeL")
