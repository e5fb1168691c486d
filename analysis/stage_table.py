"""The results of stages as a table (CSV), a row for each losses file, benchmark and task of a stage.

A report writes the table, and a report can be made from it without the runs: the answer is the same, since it needs
only the means of each stage; what needs single items is left out. The rows of several machines can be put into one
file.
"""
import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.benchmark_catalog import find_benchmarks, shipped_benchmarks
from analysis.estimates import Estimate
from analysis.stages import BENCHMARKS, STAGE, TASKS, Choices, ItemLosses, Stage, rate_text
from common.files import UserError, finite_float, parsing, read_text
from evaluation.conditions import Conditions, short_digest
from evaluation.suites import Benchmark

LOSSES = "losses"  # a kind of rows, in addition to BENCHMARKS and TASKS
STAGE_COLUMNS = ("pair", "model", "method", "rate", "seed", "stage", "flops")
ROW_COLUMNS = ("kind", "name", "metric", "category", "conditions")
# Of a stage: the FLOPs of its training. Of losses: the number of tokens, and per token the loss and the KL divergence
# from m0 (nats); the digests of the checkpoint and of its m0. Of benchmarks and tasks: the value and its standard
# error. Of multiple-choice benchmarks: the value by guessing, and the means of the negative log-likelihood (nats) and
# the bits per byte of the right options.
VALUE_COLUMNS = ("tokens", "loss", "kl", "checkpoint", "start", "value", "error", "chance", "nll", "bits_per_byte")
COLUMNS = STAGE_COLUMNS + ROW_COLUMNS + VALUE_COLUMNS
DIGITS = 12  # of digests
MAX_LOSS = 1e6  # nats per token; a guess at random has less than 20
DIGEST = "digest"  # the only condition that a table tells, apart from the metric


def number_text(value: float | None) -> str:
    """A number with ten significant digits; "" if it is unknown."""
    return "" if value is None or math.isnan(value) else f"{value:.10g}"


def digest_of(conditions: Conditions) -> str:
    """A few hexadecimal digits that stand for conditions, those read from a table included. See `unlike`."""
    known = {name: value for name, value in conditions.items() if name != "limit" or "items" not in conditions}
    return known[DIGEST] if DIGEST in known else short_digest([json.dumps(known, sort_keys=True)])


def mean_text(values: np.ndarray | None) -> str:
    """The mean of values as text; "" if they are unknown."""
    return "" if values is None else number_text(float(values.mean()))


def stage_rows(stage: Stage, categories: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a stage. categories: of the benchmarks, {name: category}; no others have a row."""
    for name, losses in stage.losses.items():
        tokens = float(losses.tokens.sum())
        yield {"kind": LOSSES, "name": name, "conditions": digest_of(losses.conditions), "tokens": number_text(tokens),
               "loss": number_text(losses.loss),
               "kl": "" if losses.kl is None else number_text(losses.kl.sum() / tokens),
               "checkpoint": (losses.digests[0] or "")[:DIGITS], "start": (losses.digests[1] or "")[:DIGITS]}
    for name, estimate in stage.tasks.items():
        yield value_row(stage, TASKS, name, estimate)
    for name, estimate in stage.benchmarks.items():
        if name in categories:
            row = value_row(stage, BENCHMARKS, name, estimate) | {"category": categories[name]}
            if choices := stage.choices.get(name):
                row |= {"chance": number_text(choices.chance), "nll": mean_text(choices.nll),
                        "bits_per_byte": mean_text(choices.bits_per_byte)}
            yield row


def value_row(stage: Stage, kind: str, name: str, estimate: Estimate) -> dict[str, Any]:
    """The row of a benchmark or a task."""
    conditions = stage.conditions[kind, name]
    return {"kind": kind, "name": name, "metric": conditions["metric"], "conditions": digest_of(conditions),
            "value": number_text(estimate.value), "error": number_text(estimate.error)}


def stage_table(stages: Sequence[Stage]) -> str:
    """The table of stages as CSV. Parts of benchmarks are left out."""
    categories = {one.name: one.category for one in find_benchmarks(stages) if not one.part_of}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for stage in stages:
        of_stage = {"pair": "" if stage.pair is None else stage.pair, "model": stage.model,
                    "method": stage.method or "", "rate": stage.rate or "", "seed": stage.seed, "stage": stage.name,
                    "flops": number_text(stage.flops)}
        writer.writerows(of_stage | row for row in stage_rows(stage, categories))
    return text.getvalue()


def read_stage_table(path: Path) -> list[Stage]:
    """The stages of a table, or of several that were put together. Raises UserError if it is damaged or has two
    different rows for the same result."""
    lines = csv.DictReader(io.StringIO(read_text(path)))
    if lacking := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
        raise UserError(f"{path} is not a table of stages with commas between its columns, as a report writes it: the "
                        f"column {lacking[0]} is missing")
    stages: dict[tuple[str, ...], Stage] = {}
    rows = set()
    with parsing(path, "a table of stages"):
        for row in lines:
            if not any(row.values()) or all(row[name] == name for name in COLUMNS):  # the head of another table
                continue
            place = f"{path}, line {lines.line_num},"
            if None in row or None in row.values():
                raise UserError(f"{place} does not have the {len(lines.fieldnames or ())} columns of the first line")
            with parsing(place, "a row of a table of stages"):
                key = tuple(row[name] for name in STAGE_COLUMNS)
                if key not in stages:
                    stages[key] = empty_stage(row)
                if tuple(row.items()) not in rows:  # several tables in one file may share rows, such as those of m0
                    add_row(stages[key], row, path)
                rows.add(tuple(row.items()))
    if not stages:
        raise UserError(f"{path} has no rows")
    return list(stages.values())


def empty_stage(row: dict[str, str]) -> Stage:
    """The stage of a row, without results."""
    if not (match := STAGE.fullmatch(row["stage"])):
        raise ValueError(f"unknown stage {row['stage']!r}")
    return Stage(row["model"], int(row["seed"]), int(match[1]), row["stage"], match[2], method=row["method"] or None,
                 pair=int(row["pair"]) if row["pair"] else None, rate=rate_text(row["rate"]) if row["rate"] else None,
                 run={"lineage": {"flops": finite_float(row["flops"])}} if row["flops"] else {})


def number_of(row: dict[str, str], name: str, low: float = 0.0, high: float = MAX_LOSS) -> float:
    """A number in a row. Raises ValueError if it is not within the bounds."""
    if not low <= (value := finite_float(row[name])) <= high:
        raise ValueError(f"{name} is {value:g}, expected {low:g} to {high:g}")
    return value


def add_row(stage: Stage, row: dict[str, str], path: Path) -> None:
    """Adds the result in a row to a stage. A mean stands for all items."""
    kind, name = row["kind"], row["name"]
    results: dict[str, dict[str, Any]] = {LOSSES: stage.losses, BENCHMARKS: stage.benchmarks, TASKS: stage.tasks}
    if (known := results.get(kind)) is None:
        raise ValueError(f"unknown kind {kind!r}")
    if name in known:
        raise UserError(f"{path} has two rows for {kind} {name} of {stage.model} {stage.name}"
                        + (f", pair {stage.pair}" if stage.pair is not None else "") + ": remove one")
    conditions = {DIGEST: row["conditions"]}
    if kind == LOSSES:
        tokens = np.array([number_of(row, "tokens", 1, math.inf)])
        kl = number_of(row, "kl") * tokens if row["kl"] else None
        stage.losses[name] = ItemLosses(number_of(row, "loss") * tokens, tokens, kl, conditions,
                                        (row["checkpoint"] or None, row["start"] or None))
        return
    known[name] = Estimate(finite_float(row["value"]), finite_float(row["error"]) if row["error"] else math.nan)
    stage.conditions[kind, name] = conditions | {"metric": row["metric"]}
    if kind == BENCHMARKS and name not in shipped_benchmarks():
        stage.described[name] = Benchmark(name, row["category"], row["metric"])
    if row["chance"]:
        nll, bits = (np.array([number_of(row, key)]) if row[key] else None for key in ("nll", "bits_per_byte"))
        stage.choices[name] = Choices(np.array([finite_float(row["value"])]), nll, bits, finite_float(row["chance"]))
