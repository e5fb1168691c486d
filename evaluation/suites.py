"""Suites of benchmarks: TOML files, in configs/eval or anywhere, with a list of [[benchmark]].

What checks and runs their benchmarks is benchmarks.py; this is apart from it since lm-eval takes seconds to import.
"""
from dataclasses import dataclass, field
from pathlib import Path

from common.files import UserError
from common.settings import CONFIGS, ROOT, known, read_toml


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite: what to run, and how the report speaks of it."""
    name: str  # a task or group of lm-eval, or for a local file a name of one's own
    category: str
    metric: str = "acc"  # the figure that the benchmark is judged by
    num_fewshot: int = 0
    label: str | None = None
    part_of: str | None = None  # a benchmark of the suite that this is a part of: it does not count in the category
    file: str | None = None  # a local JSONL file: its first num_fewshot lines are the examples, the others the items
    pairs: bool = False  # the items are {sent_more, sent_less}: the share of pairs with the first one more likely
    by: str | None = None  # a field: each of its values is a benchmark too, a part of this one
    where: dict = field(default_factory=dict)  # only the items with these fields
    options: dict = field(default_factory=dict)  # lm-eval's own keys: doc_to_text, doc_to_choice, doc_to_target, …


def open_suite(name, folder=None):
    """(path, entries, folder) of a suite: its TOML file, the list of its [[benchmark]], and where local files lie.

    name: one in configs/eval, or the path of a TOML file. folder: where its local files lie; none: where the key
    `folder` says, in this project, or beside the TOML file. Raises UserError.
    """
    path = CONFIGS / "eval" / f"{name}.toml"
    path = path if path.exists() else Path(name)
    if path.suffix != ".toml" or not path.exists():
        raise UserError(f"unknown suite {name!r}, expected one of {', '.join(known('eval'))} or the path of a .toml "
                        "file")
    table = read_toml(path)
    entries, place = table.get("benchmark", []), table.get("folder", "")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: expected a list of [[benchmark]]")
    problems = [f"unknown key {key!r}" for key in table if key not in ("folder", "benchmark")]
    problems += ["folder is no text"] if not isinstance(place, str) else []
    problems += ["it names no [[benchmark]]"] if not entries else []
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return path, entries, Path(folder or (ROOT / place if place else path.parent))
