"""The TOML files in configs/: sizes, tasks, methods and others, each found by its name."""
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.files import UserError, first_line, read_text

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
TASK_KEYS: dict[str, type] = {"folder": str, "source": str, "decoding": dict, "target": str, "measure": str,
                              "sari": bool, "test_prompt": list, "hub": dict, "prompts": dict}
TASK_METRICS = "bleu", "rouge1", "rouge2", "rougeL", "sari", "sari_hf", "bertscore"
REQUIRED_TASK_KEYS = ["folder", "source", "decoding"]
PHASES = "base", "stack", "llm"  # of pretraining: tables in the file of a size
SIZE_TABLES = "hub", "model", "growth", "pretraining", *PHASES, "study", "finetune"


def below_root(path: str | Path) -> str:
    """Makes a path in the project's folder relative to it, and returns any other text unchanged. Records hold this
    form, so that they stay valid when the project is moved."""
    return str(path).removeprefix(f"{ROOT}/")


def known(kind: str) -> list[str]:
    """Names of the TOML files in configs/<kind>: known("task") -> ["empd", …]."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.toml"))


def unknown_name(kind: str, name: str, names: Iterable[str] | None = None) -> list[str]:
    """A list with the sentence that rejects an unknown name; empty if the name is known."""
    accepted = known(kind) if names is None else names
    return [] if name in accepted else [f"unknown {kind} {name!r}, expected one of {', '.join(accepted)}"]


def read_toml(path: str | Path) -> dict:
    """The tables of a TOML file. Raises UserError if it does not exist or is not TOML."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not TOML that can be read: it is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise UserError(f"{path} is not TOML: {first_line(error)}") from None


def read_config(kind: str, name: str) -> dict:
    """The tables of configs/<kind>/<name>.toml. Raises UserError for a task that lacks a key or has an unknown one, and
    for a size with an unknown table.

    The phases of pretraining of a size begin with what they share, its table [pretraining].
    """
    if problem := unknown_name(kind, name):
        raise UserError(problem[0])
    path = CONFIGS / kind / f"{name}.toml"
    tables = read_toml(path)
    if kind == "task":
        check_task(path, tables)
    if kind == "size":
        if unknown := [table for table in tables if table not in SIZE_TABLES]:
            raise UserError(f"{below_root(path)}: unknown table [{unknown[0]}], expected {', '.join(SIZE_TABLES)}")
        shared = tables.pop("pretraining", {})
        tables |= {phase: shared | tables[phase] for phase in PHASES if phase in tables}
    return tables


def check_task(path: Path, tables: Mapping[str, object]) -> None:
    """Raises UserError unless the tables are those of a task (docs/reference.md)."""
    problems = [] if re.fullmatch(r"[\w-]+", path.stem) else [
        "the name of a task, which folders have, consists of letters, digits, _ and -: rename the file"]
    problems += ["the name text is that of the held-out text in results: rename the file"] * (path.stem == "text")
    problems += [f"{key} is missing" for key in REQUIRED_TASK_KEYS if key not in tables]
    problems += [f"unknown key {key!r}" for key in tables if key not in TASK_KEYS]
    problems += [f"{key} is {value!r:.80}, expected {'a table' if TASK_KEYS[key] is dict else TASK_KEYS[key].__name__}"
                 for key, value in tables.items() if key in TASK_KEYS and not isinstance(value, TASK_KEYS[key])]
    if isinstance(metric := tables.get("measure", "rougeL"), str) and metric not in TASK_METRICS:
        problems.append(f"measure is {metric!r:.80}, expected one of {', '.join(TASK_METRICS)}")
    elif str(metric).startswith("sari") and not tables.get("sari"):
        problems.append(f"measure is {metric}, which takes sari = true")
    problems += hub_problems(tables)
    if problems:
        raise UserError(f"{below_root(path)}: {'; '.join(problems)}")


def hub_problems(tables: Mapping[str, Any]) -> list[str]:
    """What is wrong with the description of a task's data on the Hub, as sentences."""
    problems = []
    if isinstance(hub := tables.get("hub"), dict):
        problems += [f"[hub] lacks {key}" for key in ("dataset", "splits", "columns") if key not in hub]
        problems += [f"{key} in [hub] is {hub[key]!r:.80}, expected a table" for key in ("splits", "columns")
                     if not isinstance(hub.get(key, {}), dict)]
        if not problems and "train" not in hub["splits"]:
            problems.append("splits in [hub] lacks train")
        labels = hub["labels"].get("field") if isinstance(hub.get("labels"), dict) else None
        fields = [labels, *(("input_text", "output_text") if "dialogue" in hub else ())]
        if not problems and "target" in tables and tables["target"] not in [*fields, *hub["columns"]]:
            problems.append(f"target is {tables['target']!r:.80}, expected a field in columns of [hub]")
    if isinstance(prompts := tables.get("prompts"), dict):
        problems += [] if prompts else ["[prompts] has no prompt"]
        problems += [f"{name} in [prompts] is {templates!r:.80}, expected a list of texts" for name, templates
                     in prompts.items() if not templates or not isinstance(templates, list)
                     or not all(isinstance(template, str) for template in templates)]
    return problems
