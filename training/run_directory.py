"""Run directories and run.json.

A run writes to `<out>.partial/`, which is renamed to `<out>/` when the final weights are on disk: run directories
appear atomically. `run.json` in either records what the run depends on.
"""
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import UserError, explain_os_errors
from common.formatting import format_duration, format_loss
from common.metrics_log import MetricsLog, open_services
from common.provenance import differences, read_record, write_record

if TYPE_CHECKING:
    from training.run import Run


def partial_directory(out: str | Path) -> Path:
    """The directory that a run writes to until it is finished."""
    return Path(out).with_name(Path(out).name + ".partial")


def is_finished(out: str | Path, record: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether this run is finished. Raises UserError if its directory belongs to a run with other settings."""
    out, partial = Path(out), partial_directory(out)
    if out.exists() and not read_record(out):
        raise UserError(f"{out} exists and is not a run of this program: remove it or choose another --out")
    for directory in (out, partial):
        if (recorded := read_record(directory)) and (found := differences(record, recorded, defaults)):
            raise UserError(f"{directory} belongs to a run with other settings: {'; '.join(found)}. "
                            "Choose another --out, or remove it to train again")
    return out.exists()


def start_run(directory: Path, record: Mapping[str, Any]) -> None:
    """Makes the directory of a run, with its run.json.

    Removes what an unfinished run without a saved state left there. Its epoch checkpoints are kept, in
    `<out>.partial.old/`.
    """
    if directory.exists():
        old = directory.with_name(directory.name + ".old")
        print(f"{directory} was left by a run that did not finish: starting from the beginning", flush=True)
        if list(directory.glob("checkpoint-*")):
            print(f"its checkpoints are kept in {old}", flush=True)
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        else:
            shutil.rmtree(directory)
    with explain_os_errors(directory):
        directory.mkdir(parents=True)
    lock(directory)
    write_record(directory, record)


def continue_run(directory: Path, record: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Records in run.json that the run was resumed after a step; returns the new content."""
    recorded = read_record(directory)
    resumed = {"after_step": step} | {key: record[key] for key in ("commit", "processes", "device")}
    recorded["resumed"] = [*recorded.get("resumed", []), resumed]
    write_record(directory, recorded)
    return recorded


def open_log(run: "Run", step: int) -> MetricsLog:
    """The log of a run that starts or resumes after a step; ranks other than 0 log nothing."""
    if run.dist.rank:
        return MetricsLog(None)
    return MetricsLog(run.directory, step, open_services(run.cfg, run.directory, run.record))


def finish_run(run: "Run", result: dict[str, Any]) -> None:
    """Records the result in run.json and renames the directory, whose final weights are on disk, to `<out>`."""
    out = Path(run.cfg.out)
    write_record(run.directory, run.record | {"result": result, "lineage": run.lineage_after(result)})
    with explain_os_errors(out):
        run.directory.rename(out)
    drop_state(out)


def drop_state(out: str | Path) -> None:
    """Removes the saved state of a finished run; an earlier call may have been killed."""
    shutil.rmtree(Path(out) / "resume", ignore_errors=True)


def lock(directory: Path) -> int:
    """Locks a directory until the returned descriptor is closed or this process ends.

    Raises UserError if another process has locked it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is using {directory}: wait until it ends, or stop it") from None
    except OSError:  # the file system has no locks
        pass
    return descriptor


def prune_checkpoints(directory: Path, limit: int) -> None:
    """Removes the oldest epoch checkpoints beyond a limit."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    for path in found[:max(0, len(found) - limit)]:
        shutil.rmtree(path)


def last_checkpoint(directory: Path) -> str:
    """The newest epoch checkpoint of an unfinished run, for messages."""
    kept = sorted(directory.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    return str(kept[-1]) if kept else "the initial checkpoint"


def print_result(out: str | Path) -> None:
    """Prints the result of a finished run: test examples, speed, eval loss before and after, the path."""
    result = read_record(out)["result"]
    for index, example in enumerate(result["examples"], 1):
        for name, text in (("input", example["input"]), ("reference", example["output"]),
                           ("model", example["prediction"])):
            print(f"example {index} {name:>9}: {' '.join(text.split())}")
    print(f"{result['steps']} steps, {result['tokens']:,} tokens in {format_duration(result['seconds'])} "
          f"({result['tokens_per_s']:,.0f} tokens/s), "
          f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process")
    print(f"eval loss before {format_loss(result['eval_loss_before'])}, after {format_loss(result['eval_loss_after'])}")
    print(f"checkpoint: {out}", flush=True)
