"""Run directories: what a run is made of, whether it is finished, its log of steps, and its result.

A stage is whole or absent. Training works in `<out>.partial/`, which takes the name `<out>` when the final weights are
on disk; `run.json` in either says what the run is made of.
"""
import fcntl
import os
import shutil
from pathlib import Path

from common.files import UserError, explain_os_errors, read_json, write_json
from common.formatting import format_duration, show
from common.provenance import differences


def is_finished(out, run, defaults):
    """Whether this run was finished before. Raises UserError where its directory belongs to other settings."""
    out = Path(out)
    partial = partial_directory(out)
    if out.exists() and not (out / "run.json").exists():
        raise UserError(f"{out} exists and is no run of this program: remove it or choose another --out")
    for directory in (out, partial):
        if (directory / "run.json").exists() and (found := differences(run, directory / "run.json", defaults)):
            raise UserError(f"{directory} belongs to a run with other settings: {'; '.join(found)}. "
                            "Choose another --out, or remove it to train anew")
    return out.exists()


def partial_directory(out):
    """The directory that a run works in until it is finished."""
    return Path(out).with_name(Path(out).name + ".partial")


def start_run(out, run):
    """Makes `<out>.partial/`, the directory that a run works in, with its run.json; returns it.

    What an unfinished run that saved no state has left there goes, but for checkpoints: those are kept under
    `<out>.partial.old/`.
    """
    partial = partial_directory(out)
    if partial.exists():
        old = partial.with_name(partial.name + ".old")
        print(f"{partial} was left by a run that did not finish: starting again from its beginning", flush=True)
        if list(partial.glob("checkpoint-*")):
            print(f"its checkpoints are kept in {old}", flush=True)
            shutil.rmtree(old, ignore_errors=True)
            partial.rename(old)
        else:
            shutil.rmtree(partial)
    with explain_os_errors(partial):
        partial.mkdir(parents=True)
    lock(partial)
    write_json(partial / "run.json", run)
    return partial


def continue_run(partial, run, step):
    """Notes in run.json that a run goes on after so many steps, and who carries it out now; returns what it says."""
    recorded = read_json(partial / "run.json")
    now = {"after_step": step} | {key: run[key] for key in ("commit", "processes", "device")}
    recorded["resumed"] = [*recorded.get("resumed", []), now]
    write_json(partial / "run.json", recorded)
    return recorded


def finish_run(out, partial, run):
    """Gives a run whose final weights are on disk its name, with the result in run.json and no saved state."""
    write_json(partial / "run.json", run)
    with explain_os_errors(out):
        partial.rename(out)
    drop_state(out)


def drop_state(out):
    """Removes the saved state of a finished run, also where an earlier attempt was killed in between."""
    shutil.rmtree(Path(out) / "resume", ignore_errors=True)


def lock(directory):
    """Keeps a directory for this process, for as long as it lives; a UserError where another one works in it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process works in {directory}: wait until it has ended, or stop it") from None
    except OSError:  # a file system without locks
        os.close(descriptor)


def print_result(out):
    """Prints what a finished run came to: three test examples, eval loss before and after, the path."""
    result = read_json(Path(out) / "run.json")["result"]
    for index, example in enumerate(result["examples"], 1):
        for name, text in (("input", example["input"]), ("reference", example["output"]),
                           ("model", example["prediction"])):
            print(f"example {index} {name:>9}: {' '.join(text.split())}")
    print(f"{result['steps']} steps, {result['tokens']:,} tokens in {format_duration(result['seconds'])} "
          f"({result['tokens_per_s']:,.0f} tokens/s), "
          f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process")
    print(f"eval loss before {show(result['eval_loss_before'])}, after {show(result['eval_loss_after'])}")
    print(f"checkpoint: {out}", flush=True)
