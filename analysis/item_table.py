"""The losses of single items (`items.jsonl`), which a report writes next to the table of stages.

Intervals over the items of a single run need them. A line belongs to a checkpoint by its digest, so that the lines of
several reports can be put into one file.
"""
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis.stage_table import DIGITS, digest_of
from analysis.stages import ItemLosses, Stage
from common.files import UserError, is_number, json_lines, parse_json, parsing, read_text

ITEMS = "items.jsonl"
DECIMALS = 4  # of an item's losses, which are sums over its tokens, in nats
TOLERANCE = 1e-4  # nats per token by which the items may differ from the mean in the table of stages

# The digests of a checkpoint and of its m0, the name of the losses, and the digest of the other conditions.
KEY_FIELDS = "checkpoint", "start", "name", "conditions"
Key = tuple[str, ...]  # their values


def losses_key(name: str, losses: ItemLosses) -> Key:
    """The key that identifies the losses of one checkpoint."""
    checkpoint, start = ((digest or "")[:DIGITS] for digest in losses.digests)
    return checkpoint, start, name, digest_of(losses.conditions)


def item_table(stages: Sequence[Stage]) -> str:
    """The losses by item of all stages, a JSON object in each line. Those of unknown checkpoints are left out, and
    those of which only the mean is known."""
    rows = {}
    for stage in stages:
        for name, losses in stage.losses.items():
            if len(losses.nll) > 1 and losses.digests[0]:
                key = losses_key(name, losses)
                kl = None if losses.kl is None else losses.kl.round(DECIMALS).tolist()
                rows[key] = dict(zip(KEY_FIELDS, key)) | {"tokens": losses.tokens.astype(int).tolist(),
                                                          "nll": losses.nll.round(DECIMALS).tolist(), "kl": kl}
    return json_lines(rows.values())


def with_items(stages: Sequence[Stage], path: Path) -> list[Stage]:
    """The stages of a table, with the losses of single items where the file has them; elsewhere the means stay. Raises
    UserError if the file is damaged or its items do not have the means in the table."""
    items = read_items(path) if path.exists() else {}
    with_losses = []
    for stage in stages:
        losses = {}
        for name, mean in stage.losses.items():
            losses[name] = replace(items.get(losses_key(name, mean), mean), conditions=mean.conditions,
                                   digests=mean.digests)
            if differing := [what for what, one, other in totals(losses[name], mean) if abs(one - other) > TOLERANCE]:
                raise UserError(f"{path} has another {differing[0]} of {name} after {stage.name} of {stage.model} than "
                                "the table next to it: take both files from one report, or remove it")
        with_losses.append(replace(stage, losses=losses))
    return with_losses


def totals(one: ItemLosses, other: ItemLosses) -> list[tuple[str, float, float]]:
    """(name, value, value) of the totals that two descriptions of the same losses share."""
    return [("number of tokens", one.tokens.sum(), other.tokens.sum()), ("loss", one.loss, other.loss),
            ("KL", mean_kl(one), mean_kl(other))]


def mean_kl(losses: ItemLosses) -> float:
    """The KL divergence from m0 in nats per token; -1 if it was not measured."""
    return -1.0 if losses.kl is None else float(losses.kl.sum() / losses.tokens.sum())


def read_items(path: Path) -> dict[Key, ItemLosses]:
    """{key: losses by item} of a file. Blank lines are skipped."""
    items = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number},"
        with parsing(where, "the losses of items, as a report writes them"):
            if line.strip():
                row = parse_json(line, where)
                tokens, nll = numbers(row["tokens"], at_least=1), numbers(row["nll"])
                kl = None if row["kl"] is None else numbers(row["kl"])
                if not 0 < len(tokens) == len(nll) == len(nll if kl is None else kl):
                    raise ValueError("an item has no tokens or no loss")
                key = tuple(row[field] for field in KEY_FIELDS)
                items[key] = ItemLosses(tokens=tokens, nll=nll, kl=kl, conditions={})
    return items


def numbers(values: list[float], at_least: float = 0.0) -> np.ndarray:
    """Values as an array. Raises ValueError if one is not a number or is too small."""
    if not all(is_number(value) and value >= at_least for value in values):
        raise ValueError(f"a value is not a number of at least {at_least:g}")
    return np.array(values, float)
