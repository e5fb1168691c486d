"""The losses of single items (`items.jsonl`), which a report writes next to the table of stages.

Intervals over the items of a single run need them. A line belongs to a checkpoint by its digest, so that the lines of
several reports can be put into one file, and one file can serve several tables.
"""
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis.stage_table import DIGITS, digest_of
from analysis.stages import ItemLosses, Stage
from common.files import UserError, is_number, parse_json, parsing, read_text

ITEMS = "items.jsonl"
DECIMALS = 4  # of an item's losses, which are sums over its tokens, in nats
TOLERANCE = 1e-4  # nats per token by which the items may differ from the mean in the table of stages

Key = tuple[str, str, str, str]  # digests of the checkpoint and of its m0, name, digest of the conditions


def key_of(name: str, losses: ItemLosses) -> Key:
    """What tells the losses of one checkpoint from others."""
    checkpoint, start = ((digest or "")[:DIGITS] for digest in losses.digests)
    return checkpoint, start, name, digest_of(losses.conditions)


def item_table(stages: Sequence[Stage]) -> str:
    """The losses by item of all stages, a JSON object in each line. Those of unknown checkpoints are left out, and
    those of which only the mean is known."""
    lines = {}
    for stage in stages:
        for name, losses in stage.losses.items():
            if len(losses.nll) > 1 and losses.digests[0]:
                key = key_of(name, losses)
                kl = None if losses.kl is None else losses.kl.round(DECIMALS).tolist()
                lines[key] = json.dumps(dict(zip(("checkpoint", "start", "name", "conditions"), key)) | {
                    "tokens": losses.tokens.astype(int).tolist(), "nll": losses.nll.round(DECIMALS).tolist(), "kl": kl})
    return "".join(f"{line}\n" for line in lines.values())


def with_items(stages: Sequence[Stage], path: Path) -> list[Stage]:
    """The stages of a table with the losses of their single items, of the texts and tasks whose items the file has for
    all these stages; of all others the means stay. Raises UserError if the file is damaged or the items do not have the
    mean in the table."""
    if not path.exists():
        return list(stages)
    items = read_items(path)
    keys = {(number, name): key_of(name, losses) for number, stage in enumerate(stages)
            for name, losses in stage.losses.items()}
    incomplete = {key[2:] for key in keys.values() if key not in items}
    found: list[Stage] = []
    for number, stage in enumerate(stages):
        losses = {}
        for name, mean in stage.losses.items():
            losses[name] = mean
            if (key := keys[number, name])[2:] not in incomplete:
                losses[name] = replace(items[key], conditions=mean.conditions, digests=mean.digests)
                if losses[name].tokens.sum() != mean.tokens.sum() or abs(losses[name].loss - mean.loss) > TOLERANCE:
                    raise UserError(f"{path} has other losses of {name} after {stage.name} of {stage.model} than the "
                                    f"table beside it ({losses[name].loss:.4f} and {mean.loss:.4f} nats per token): "
                                    "take both files from one report, or remove it")
        found.append(replace(stage, losses=losses))
    return found


def read_items(path: Path) -> dict[Key, ItemLosses]:
    """{key: losses by item} of a file."""
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number},"
        with parsing(where, "the losses of items, as a report writes them"):
            row = parse_json(line, where)
            tokens, nll = numbers(row["tokens"]), numbers(row["nll"])
            kl = None if row["kl"] is None else numbers(row["kl"])
            if not len(tokens) == len(nll) == len(nll if kl is None else kl) or not len(tokens) or tokens.min() < 1:
                raise ValueError("an item has no tokens or no loss")
            found[row["checkpoint"], row["start"], row["name"], row["conditions"]] = ItemLosses(tokens=tokens, nll=nll,
                                                                                              kl=kl, conditions={})
    return found


def numbers(values: list[float]) -> np.ndarray:
    """Values as an array. Raises ValueError if one is no number."""
    if not all(map(is_number, values)):
        raise ValueError("a value is no number")
    return np.array(values, float)
