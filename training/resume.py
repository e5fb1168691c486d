"""The saved state of an unfinished run. A resumed run gives the same results as an uninterrupted one.

A saved state is a folder `resume/step-<n>/` in the run's directory, which appears atomically:

    rank-<r>.safetensors    fp32 master weights and optimizer state: the fragments of rank r
    state.json              the loop's counters, digests of the files, and the run that they belong to

A state can be resumed with any number of ranks under any ZeRO stage. There is no random state: the order of the
samples is a function of (seed, step).
"""
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import UserError, digest, json_digest, parsing, read_json
from common.provenance import read_record
from common.stop_request import STOPPED
from common.writing import explain_os_errors, sync, write_json
from model.parameter_files import ParameterFiles, write_parameter_file
from training.engine import check_finite_weights
from training.run import Run
from training.run_directory import continue_run, saved_states
from training.train_state import TrainState
from training.zero_shards import (
    base_optimizer,
    fill_optimizer_state,
    local_fragments,
    state_of,
    update_weights,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MASTER = "master"  # kind of the fp32 weights; the other kinds have the optimizer's names, such as exp_avg


class StateSaver:
    """Saves the state every `save_minutes`, and when a signal asks the run to stop."""

    def __init__(self, run: Run, engine: "DeepSpeedEngine"):
        self.run, self.engine, self.saved = run, engine, time.monotonic()

    def save_or_stop(self, state: TrainState, steps: int) -> None:
        """Saves the state if it is time, and ends the process if any rank was asked to stop."""
        dist = self.run.dist
        elapsed = time.monotonic() - self.saved
        stopping, due = dist.all_reduce_sum(self.run.request.signal is not None,
                                            dist.rank == 0 and elapsed >= 60 * self.run.cfg.save_minutes)
        if stopping or due:
            save_state(self.run, self.engine, state)
            self.saved = time.monotonic()
        if stopping:
            dist.print0(f"stopped by a signal after step {state.step} of {steps}: the same command resumes from there")
            sys.exit(STOPPED)


def save_state(run: Run, engine: "DeepSpeedEngine", state: TrainState) -> None:
    """Saves the state, then removes the one saved before.

    Every rank writes its own file, one fragment at a time, without communication.
    """
    folder = run.directory / "resume" / f"step-{state.step}"
    writing = folder.with_name(folder.name + ".writing")

    def make() -> None:
        with explain_os_errors(writing):
            shutil.rmtree(writing, ignore_errors=True)  # left by a killed process
            writing.mkdir(parents=True)

    def complete() -> None:
        write_state(writing, {"progress": asdict(state), "run": run.record["id"],
                              "optimizer_step": optimizer_updates(engine), "files": dict(files)})
        with explain_os_errors(folder):
            sync(writing)
            writing.rename(folder)
            sync(folder.parent)
            sync(run.directory / "metrics.jsonl")
            for old in folder.parent.iterdir():
                if old != folder:
                    shutil.rmtree(old)

    check_finite_weights(run, engine)
    run.dist.on_rank0(make)
    try:
        files = run.dist.gather(run.dist.on_all_ranks(lambda: write_fragments(engine, writing, run.dist.rank)))
        run.dist.on_rank0(complete)
    except UserError:  # on rank 0, after all ranks have stopped writing
        shutil.rmtree(writing, ignore_errors=True)
        raise


def write_fragments(engine: "DeepSpeedEngine", folder: Path, rank: int) -> tuple[str, str]:
    """Writes this rank's file; returns its name and digest."""
    path, state = folder / f"rank-{rank}.safetensors", base_optimizer(engine).state
    fragments = local_fragments(engine) if engine.zero_optimization() or rank == 0 else []  # without ZeRO all are equal
    names = {kind: None for fragment in fragments for kind, value in state.get(fragment.flat, {}).items()
             if value.shape == fragment.flat.shape}
    kinds: dict[str, Any] = {MASTER: lambda fragment: fragment.of(fragment.flat)}
    kinds |= {kind: partial(state_of, state, kind) for kind in names}
    write_parameter_file(path, fragments, kinds)
    return path.name, digest([path])


def optimizer_updates(engine: "DeepSpeedEngine") -> int:
    """The number of optimizer updates; skipped steps do not count."""
    return max((int(state["step"]) for state in base_optimizer(engine).state.values() if "step" in state), default=0)


def resume(run: Run, engine: "DeepSpeedEngine") -> tuple[Run, TrainState] | None:
    """Restores the state of an unfinished run; returns the run, with the restart in its record, and its progress.

    Returns None if no state was saved.
    """
    found = run.dist.on_rank0(lambda: find_state(run.directory))
    if found is None:
        return None
    folder, saved = found
    with parsing(folder / "state.json", "the state of a run of this version of the program"):
        state = TrainState(**saved["progress"])
        state.check()
    load_state(run, engine, folder, saved)
    run.dist.print0(f"resuming after step {state.step}, from {folder}")
    if state.text_digest != run.record.get("held_out_digest"):  # not to be compared with the loss after
        state.text_loss_before = None
    return replace(run, record=run.dist.on_rank0(lambda: continue_run(run.directory, run.record, state.step))), state


def load_state(run: Run, engine: "DeepSpeedEngine", folder: Path, saved: Mapping[str, Any]) -> None:
    """Loads a saved state into a new engine. saved: its state.json. Raises UserError for damaged files.

    The ranks first check the digests of all files.
    """
    dist, names = run.dist, sorted(saved["files"])

    def check() -> None:
        for name in names[dist.rank::dist.world_size]:
            if digest([folder / name]) != saved["files"][name]:
                raise UserError(f"{folder / name} is damaged, its digest is not the one in state.json: remove "
                                f"{folder} to train again")

    dist.on_all_ranks(check)
    files = dist.on_all_ranks(lambda: ParameterFiles([folder / name for name in names], "the saved state"))
    dist.on_all_ranks(lambda: restore(engine, files, saved["optimizer_step"]))
    update_weights(engine)


@torch.no_grad()
def restore(engine: "DeepSpeedEngine", files: ParameterFiles, updates: int) -> None:
    """Fills this rank's master weights and optimizer state from files."""
    for fragment in local_fragments(engine):
        files.read(MASTER, fragment.name, fragment.start, fragment.of(fragment.flat))
    fill_optimizer_state(engine, files, files.kinds - {MASTER}, updates)


def find_state(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the saved state of an unfinished run and its state.json, or None.

    Raises UserError if the state belongs to another run or is incomplete.
    """
    folder = next(reversed(saved_states(directory)), None)
    if folder is None:
        return None
    saved = read_state(folder)
    if saved["run"] != read_record(directory).get("id"):
        raise UserError(f"{folder} is the state of a run other than {directory}/run.json: remove it to train again")
    if missing := [name for name in saved["files"] if not (folder / name).is_file()]:
        raise UserError(f"{folder} is incomplete, {', '.join(missing)} is missing: remove it to train again")
    return folder, saved


# The entries of state.json and their types.
STATE_TYPES = {"progress": dict, "run": str, "optimizer_step": int, "files": dict}


def write_state(folder: Path, entries: Mapping[str, Any]) -> None:
    """Writes state.json of a saved state: the entries in STATE_TYPES, and their digest."""
    write_json(folder / "state.json", {**entries, "digest": json_digest(entries)})


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a saved state. Raises UserError if it lacks an entry or has been changed."""
    saved = read_json(folder / "state.json", dict)
    found = saved.pop("digest", None)
    if not all(isinstance(saved.get(name), kind) for name, kind in STATE_TYPES.items()) or \
            not all(re.fullmatch(r"rank-\d+\.safetensors", name) for name in saved["files"]):
        raise UserError(f"{folder}/state.json lacks entries of a saved state: remove {folder} to train again")
    if found != json_digest(saved):
        raise UserError(f"{folder}/state.json is damaged, its content does not have the digest in it: remove {folder} "
                        "to train again")
    return saved
