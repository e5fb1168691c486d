"""Rehearsal: training again on samples of earlier tasks."""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.files import UserError
from common.provenance import data_digest
from corpus.tasks import read_task
from training.train_config import TrainConfig


def earlier_tasks(cfg: TrainConfig, digest: str, lineage: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks to rehearse, from the lineage of the initial checkpoint; empty without rehearsal.

    The run's own task (data with the same digest) is left out, and a task learned twice counts once.
    """
    tasks = {task["data_digest"]: task for task in lineage.get("tasks", ()) if cfg.rehearsal}
    return [task for key, task in tasks.items() if key != digest]


def check_earlier_tasks(tasks: Iterable[dict[str, Any]]) -> None:
    """Raises UserError if the data of a task to rehearse does not exist any more or has changed."""
    for task in tasks:
        path = Path(task["data"])
        if not path.is_file() or data_digest(path) != task["data_digest"]:
            what = "has changed since" if path.is_file() else "does not exist any more, or not in this folder"
            raise UserError(f"rehearsal needs {path}, which {task['task']} was learned from, but it {what}: restore it")


def rehearsed_items(cfg: TrainConfig, tasks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training items of the earlier tasks: a random share `cfg.rehearsal` of each, and at least one."""
    items = []
    for number, task in enumerate(tasks):
        available = read_task(task["data"])[0]["train"][:task["max_train_samples"]]
        count = max(1, round(cfg.rehearsal * len(available)))
        order = np.random.default_rng([cfg.seed, number]).permutation(len(available))
        items += [available[index] for index in order[:count]]
    return items
