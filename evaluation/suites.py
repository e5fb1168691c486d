"""Suites of benchmarks: TOML files with a list of [[benchmark]], in configs/eval or elsewhere.

lm_eval_tasks.py turns them into lm-eval tasks. This module does not import lm-eval, which takes seconds.
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.configs import CONFIGS, ROOT, known, read_toml
from common.files import UserError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite."""
    name: str  # a task or group of lm-eval; for a local file any name
    category: str
    metric: str = "acc"  # the primary metric
    num_fewshot: int = 0
    label: str | None = None  # the name in tables, if not `name`
    # the name, metric and version of lm-eval's task in the published results, where they differ
    published_name: str | None = None
    published_metric: str | None = None
    published_version: float | None = None
    part_of: str | None = None  # the benchmark that includes this one; a part does not count in the category's mean
    file: str | None = None  # local JSONL file: the first num_fewshot lines are the few-shot examples, the rest items
    make_file: str | None = None  # how to make the file; without it, a missing file is an error in the suite
    pairs: bool = False  # items are {sent_more, sent_less}; the metric is the share with sent_more more likely
    by: str | None = None  # a field of the items: the items of each value also form a benchmark, part of this one
    where: dict[str, Any] = field(default_factory=dict)  # use only items whose fields have these values
    options: dict[str, Any] = field(default_factory=dict)  # lm-eval's own keys: doc_to_text, doc_to_choice, …


def version_note(benchmark: Benchmark, version: str) -> str | None:
    """A sentence on a benchmark whose task in lm-eval is not the published runs'; None if it is, or nothing is known.

    version: of the task that was run; empty if unknown.
    """
    version, published = version.removesuffix(".0"), benchmark.published_version
    if not version or published is None or version == f"{published:g}":
        return None
    return f"{benchmark.name}: version {version} of lm-eval's task, the published figures are of version {published:g}"


def open_suite(name: str, folder: str | Path | None = None) -> tuple[Path, list[dict], Path]:
    """Returns the path of a suite's TOML file, its [[benchmark]] entries, and the folder of its local files.

    `name` is a name in configs/eval or the path of a TOML file. `folder` defaults to the key `folder` of the TOML file
    (relative to the repository), then to the folder of the TOML file. Raises UserError if the file is missing or
    malformed.
    """
    path = CONFIGS / "eval" / f"{name}.toml"
    path = path if path.exists() else Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise UserError(f"unknown suite {name!r}, expected one of {', '.join(known('eval'))} or the path of a .toml "
                        "file")
    table = read_toml(path)
    entries, default_folder = table.get("benchmark", []), table.get("folder", "")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: expected a list of [[benchmark]]")
    problems = [f"unknown key {key!r}" for key in table if key not in ("folder", "benchmark")]
    problems += ["folder is not text"] if not isinstance(default_folder, str) else []
    problems += ["it has no [[benchmark]]"] if not entries else []
    problems += ["the file of a [[benchmark]] is not text"] if not all(
        isinstance(entry.get("file", ""), str) for entry in entries) else []
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return path, entries, Path(folder or (ROOT / default_folder if default_folder else path.parent))
