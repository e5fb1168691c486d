"""The state of an unfinished run, written and read so that the run goes on as if it had never stopped.

In the run's directory stands at most one `resume/step-<n>/`, whole or absent:

    rank-<r>.safetensors    fp32 master weights and the optimizer's state, the fragments that process r kept
    state.json              steps done, the loop's counters, the digests of the files, and which run they belong to

Any number of processes under any ZeRO stage can read what any other has written. There is no random state: the order of
the samples is a function of (seed, step).
"""
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from common.files import UserError, digest, explain_os_errors, read_json, sync, write_json
from common.provenance import identity
from model.parameter_files import ParameterFiles, write_parameter_file
from training.zero_shards import base_optimizer, fragments, update_weights

STOPPED = 75  # exit status of a run that was stopped and goes on when started again (EX_TEMPFAIL of sysexits.h)

MASTER = "master"  # the kind of the fp32 weights; the others have the optimizer's own names, such as exp_avg


class Saving:
    """When to save: after so many minutes, and where a signal asks the run to end (a StopRequest)."""

    def __init__(self, minutes, request, dist):
        self.minutes, self.request, self.dist, self.saved = minutes, request, dist, time.monotonic()

    def check(self, step, steps, save):
        """Calls `save()` on all processes if it is time, and ends the run if that was asked of any of them."""
        due = self.dist.rank == 0 and time.monotonic() - self.saved >= 60 * self.minutes
        stopping, due = self.dist.all_reduce_sum(self.request.signal is not None, due)
        if stopping or due:
            save()
            self.saved = time.monotonic()
        if stopping:
            self.dist.print0(f"stopped by a signal after step {step} of {steps}: the same command goes on from there")
            sys.exit(STOPPED)


def save_state(engine, directory, run, progress, dist):
    """Writes the state after `progress["step"]` steps; what was saved before goes when it is complete.

    Every process writes its own file, one fragment at a time, without talking to the others.
    """
    folder = directory / "resume" / f"step-{progress['step']}"
    partial = folder.with_name(folder.name + ".writing")

    def make():
        with explain_os_errors(partial):
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            partial.mkdir(parents=True)

    def complete():
        write_json(partial / "state.json", {"progress": progress, "run": fingerprint(run),
                                            "optimizer_step": optimizer_step(engine), "files": dict(files)})
        with explain_os_errors(folder):
            sync(partial)
            partial.rename(folder)
            sync(folder.parent)
            sync(directory / "metrics.jsonl")
            for old in folder.parent.iterdir():
                if old != folder:
                    shutil.rmtree(old)

    dist.on_rank0(make)
    try:
        files = dist.gather(dist.on_all_ranks(lambda: write_fragments(engine, partial, dist.rank)))
        dist.on_rank0(complete)
    except UserError:  # known to all of them, so nobody writes there any more
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_fragments(engine, folder, rank):
    """Writes this process's file; returns its name and digest."""
    path, state = folder / f"rank-{rank}.safetensors", base_optimizer(engine).state
    mine = fragments(engine) if engine.zero_optimization() or rank == 0 else []  # without ZeRO all keep the same
    kinds = {MASTER: lambda fragment: fragment.of(fragment.flat)}
    for kind in {kind: None for fragment in mine for kind, value in state.get(fragment.flat, {}).items()
                 if value.shape == fragment.flat.shape}:
        kinds[kind] = lambda fragment, kind=kind: fragment.of(state[fragment.flat][kind])
    write_parameter_file(path, mine, kinds)
    return path.name, digest([path])


def optimizer_step(engine):
    """How often the optimizer has updated the weights; steps that were passed over do not count."""
    return max((int(state["step"]) for state in base_optimizer(engine).state.values() if "step" in state), default=0)


def fingerprint(run):
    """A digest of what a run is made of."""
    return hashlib.sha256(json.dumps(identity(run), sort_keys=True).encode()).hexdigest()


def find_state(directory, run):
    """The folder of the saved state of an unfinished run, None if there is none.

    Raises UserError where it is that of another run or incomplete.
    """
    found = [path for path in (Path(directory) / "resume").glob("step-*") if path.suffix != ".writing"]
    if not found:
        return None
    folder = max(found, key=lambda path: int(path.name.removeprefix("step-")))
    state = read_state(folder)
    if state["run"] != fingerprint(run):
        raise UserError(f"{folder} is the state of another run than {directory}/run.json says: remove it to train anew")
    if missing := [name for name in state["files"] if not (folder / name).is_file()]:
        raise UserError(f"{folder} is incomplete, {', '.join(missing)} is missing: remove it to train anew")
    return folder


def read_state(folder):
    """state.json of a saved state, checked."""
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or not {"progress", "run", "optimizer_step", "files"} <= state.keys():
        raise UserError(f"{folder}/state.json does not say what a saved state has to: remove {folder} to train anew")
    return state


def load_state(engine, folder, dist):
    """Puts a saved state into a freshly built engine; returns the loop's progress. Raises UserError for damaged files.

    The files' digests are checked before anything is read, by all processes together.
    """
    state = read_state(folder)
    names = sorted(state["files"])

    def check():
        for name in names[dist.rank::dist.world_size]:
            if digest([folder / name]) != state["files"][name]:
                raise UserError(f"{folder / name} is damaged, its digest is not the one that state.json gives: remove "
                                f"{folder} to train anew")

    dist.on_all_ranks(check)
    saved = dist.on_all_ranks(lambda: ParameterFiles([folder / name for name in names], "the saved state"))
    dist.on_all_ranks(lambda: restore(engine, saved, state["optimizer_step"]))
    update_weights(engine)
    return state["progress"]


@torch.no_grad()
def restore(engine, saved, step):
    """Fills master weights and optimizer state of this process, and its share of the weights."""
    optimizer, mine = base_optimizer(engine), fragments(engine)
    for fragment in mine:
        if step and fragment.flat not in optimizer.state:
            optimizer.state[fragment.flat] = {"step": torch.tensor(0.0, device=fragment.flat.device),
                                              **{kind: torch.zeros_like(fragment.flat)
                                                 for kind in sorted(saved.kinds - {MASTER})}}
        state = optimizer.state.get(fragment.flat, {})
        if "step" in state:
            state["step"].fill_(step)
        saved.read(MASTER, fragment.name, fragment.start, fragment.of(fragment.flat))
        for kind in saved.kinds - {MASTER}:
            saved.read(kind, fragment.name, fragment.start, fragment.of(state[kind]))
