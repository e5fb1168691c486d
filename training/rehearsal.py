"""Rehearsal: samples of earlier tasks that are trained on again."""
from pathlib import Path

import numpy as np

from common.files import UserError
from common.provenance import data_digest
from corpus.tasks import read_task


def earlier_tasks(cfg, past):
    """The tasks that rehearsal takes samples of, as the checkpoint's lineage has them: all but the run's own, each as
    it was learned last. Raises UserError where there is none."""
    if not past.get("tasks"):
        raise UserError(f"rehearsal is set, but {cfg.init} was fine-tuned on no task before: leave it out for the first "
                        "task (--rehearsal 0)")
    found = {task["data_digest"]: task for task in past["tasks"]}
    return [task for key, task in found.items() if key != data_digest(cfg.data)]


def check_earlier_tasks(cfg, past):
    """Raises UserError where the data of a task that is to be rehearsed is gone, or has changed."""
    for task in earlier_tasks(cfg, past) if cfg.rehearsal else ():
        path = task["data"]
        if not Path(path).is_file() or data_digest(path) != task["data_digest"]:
            what = "has changed since" if Path(path).is_file() else "does not exist any more"
            raise UserError(f"rehearsal needs {path}, which {task['task']} was learned from, but it {what}: make it as "
                            "it was")


def rehearsed(cfg, past):
    """The training items of the earlier tasks that are trained on again: of each the share that was asked for."""
    items = []
    for number, task in enumerate(earlier_tasks(cfg, past) if cfg.rehearsal else ()):
        there = read_task(task["data"])[0]["train"][:task["max_train_samples"]]
        count = max(1, round(cfg.rehearsal * len(there)))
        items += [there[index] for index in np.random.default_rng([cfg.seed, number]).permutation(len(there))[:count]]
    return items
