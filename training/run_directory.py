"""Run directories and run.json.

A run writes to `<out>.partial/`, which is renamed to `<out>/` when the final weights are on disk: run directories
appear atomically. `run.json` in either records what the run depends on. `<out>.partial/resume/` has the saved state,
`step-<n>/`, which training/resume.py writes and restores; after a kill it may have two, of which the newer counts.
"""
import contextlib
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.distributed import Distributed
from common.files import UserError, parsing
from common.formatting import format_duration
from common.metrics_log import MetricsLog, open_services
from common.provenance import RUN, differences, read_record, write_record
from common.settings import json_values
from common.writing import WRITING, explain_os_errors, remove, sole_use
from training.run import Run, partial_directory
from training.train_config import TrainConfig

SHARED_SECONDS = 60.0  # after which a file of one node should be seen by the others: network file systems take time
BAR = 20  # characters of the bar of the largest change


@contextlib.contextmanager
def claim(out: str | Path) -> Iterator[None]:
    """Makes and locks the directory of an unfinished run for this process. Raises UserError if another process works in
    it, or if it is not that of a run."""
    directory = partial_directory(out)
    if Path(out).exists():
        yield  # finished: it is only read
        return
    for path in (Path(out), directory):
        if path.is_symlink() and not path.exists() or path.exists() and not path.is_dir():
            what = "a file" if path.exists() else "a link to nothing"
            raise UserError(f"{path} is {what}, expected a directory or nothing: remove it or choose another --out")
    with sole_use(directory):
        if directory.exists() and not read_record(directory) and any(
                not path.name.endswith(WRITING) for path in directory.iterdir()):
            raise UserError(f"{directory} exists and is not that of a run: remove it or choose another --out")
        yield


def check_shared(directory: Path, dist: Distributed) -> None:
    """Raises UserError, on all ranks, if the claimed directory of a run is not the same one on all nodes."""
    if dist.world_size == dist.local_world_size:
        return

    def mark() -> Path:
        with explain_os_errors(directory):
            for left in directory.glob(f"shared-*{WRITING}"):  # by a killed process
                left.unlink()
            path = directory / f"shared-{uuid.uuid4()}{WRITING}"
            path.touch()
        return path

    def find() -> None:
        end = time.monotonic() + SHARED_SECONDS
        while not marker.exists():
            if time.monotonic() > end:
                raise UserError(f"{directory} is not the same folder on all nodes: choose an --out on a file system "
                                "that they share")
            time.sleep(0.5)

    marker = dist.on_rank0(mark)
    try:
        dist.on_all_ranks(find)
    finally:
        if dist.rank == 0:
            marker.unlink()


def is_finished(out: str | Path, record: Mapping[str, Any]) -> bool:
    """Whether this run is finished. Raises UserError if its directory belongs to a run with other settings.

    The settings of an unfinished run that has neither a saved state nor a checkpoint are not compared.
    """
    out, partial, defaults = Path(out), partial_directory(out), json_values(TrainConfig())
    if out.exists() and not read_record(out):
        raise UserError(f"{out} exists and is not a run of this program: remove it or choose another --out")
    if out.exists() and "result" not in read_record(out):
        raise UserError(f"{out} is a run that was not finished: remove it, or name it {partial} to continue it")
    for directory in (out, *([partial] if saved_states(partial) or epoch_checkpoints(partial) else [])):
        if (recorded := read_record(directory)) and (found := differences(record, recorded, defaults)):
            raise UserError(f"{directory} belongs to a run with other settings: {'; '.join(found)}. "
                            "Choose another --out, or remove it to train again")
    return out.exists()


def start_run(directory: Path, record: Mapping[str, Any]) -> None:
    """Prepares the claimed directory of a run that starts at its first step, and writes run.json.

    Removes what an unfinished run without a saved state left there. Its epoch checkpoints are kept, in
    `<out>.partial.old/`.
    """
    with explain_os_errors(directory):
        if left := list(directory.iterdir()):
            print(f"{directory} was left by a run that did not finish: starting from the beginning", flush=True)
        if checkpoints := epoch_checkpoints(directory):
            old = unused_name(directory.with_name(directory.name + ".old"))
            old.mkdir()
            print(f"its checkpoints are kept in {old}", flush=True)
            for path in checkpoints:
                path.rename(old / path.name)
        for path in sorted(left, key=lambda path: path.name == RUN):  # last, since `claim` knows the directory by it
            remove(path)
    write_record(directory, record)


def unused_name(path: Path) -> Path:
    """A path that does not exist: `path`, `path-2`, `path-3`, …"""
    number, name = 1, path.name
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def continue_run(directory: Path, record: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Records a resume in run.json: the step, and the current settings and held-out text, which may differ only where
    they do not change the weights. Returns the new content."""
    recorded = {key: value for key, value in read_record(directory).items() if key != "held_out_digest"}
    recorded |= {key: record[key] for key in ("settings", "held_out_digest") if key in record}
    resumed = {"after_step": step} | {key: record[key] for key in ("commit", "processes", "device")}
    recorded["resumed"] = [*recorded.get("resumed", []), resumed]
    write_record(directory, recorded)
    return recorded


def open_log(run: Run, step: int) -> MetricsLog:
    """The log of a run that starts or resumes after a step; ranks other than 0 log nothing."""
    if run.dist.rank:
        return MetricsLog(None)
    return MetricsLog(run.directory, step, open_services(run.cfg, run.directory, run.record))


def finish_run(run: Run, result: dict[str, Any]) -> None:
    """Records the result in run.json and renames the directory, whose final weights are on disk, to `<out>`."""
    out = Path(run.cfg.out)
    write_record(run.directory, run.record | {"result": result, "lineage": run.lineage_after(result)})
    with explain_os_errors(out):
        run.directory.rename(out)
    drop_state(out)


def drop_state(out: str | Path) -> None:
    """Removes the saved state of a finished run; an earlier call may have been killed."""
    shutil.rmtree(Path(out) / "resume", ignore_errors=True)


def epoch_checkpoints(directory: Path) -> list[Path]:
    """The complete epoch checkpoints of an unfinished run, oldest first."""
    return numbered(directory, "checkpoint-")


def prune_checkpoints(directory: Path, limit: int) -> None:
    """Removes the oldest epoch checkpoints beyond a limit."""
    found = epoch_checkpoints(directory)
    for path in found[:max(0, len(found) - limit)]:
        shutil.rmtree(path)


def last_checkpoint(directory: Path) -> str:
    """The newest epoch checkpoint of an unfinished run, for messages. Checkpoints with non-finite weights are never
    written."""
    return str(next(reversed(epoch_checkpoints(directory)), "the initial checkpoint"))


def saved_states(directory: Path) -> list[Path]:
    """The saved states of an unfinished run, oldest first."""
    return numbered(directory / "resume", "step-")


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The paths in a folder whose names are a prefix and a number, in order of the numbers."""
    found = {path: int(match[1]) for path in folder.glob(f"{prefix}*")
             if (match := re.fullmatch(rf"{prefix}(\d+)", path.name))}
    return sorted(found, key=found.__getitem__)


def print_result(out: str | Path) -> None:
    """Prints the result of a finished run: test examples, speed, losses before and after, the path."""
    record = read_record(out)
    result = record["result"]
    with parsing(Path(out) / RUN, "the record of a finished run of this version"):
        for index, example in enumerate(result["examples"], 1):
            for name, text in (("input", example["input"]), ("reference", example["output"]),
                               ("model", example["prediction"])):
                print(f"example {index} {name:>9}: {' '.join(text.split())}")
        print(f"{result['steps']} steps, {result['tokens']:,} tokens in {format_duration(result['seconds'])} "
              f"({result['tokens_per_s']:,.0f} tokens/s), "
              f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process")
        print(*loss_lines(result, record["settings"].get("task")), f"checkpoint: {out}", sep="\n", flush=True)


def loss_lines(result: Mapping[str, Any], task: str | None) -> list[str]:
    """A line for each loss that was measured before and after a run, in nats per token, with the change as a bar."""
    rows = [(f"loss on {task or 'held-out text'}", "eval_loss", "worse"),
            ("loss on held-out text", "text_loss", "forgot")]
    losses = [(label, worse, result[f"{name}_before"], result[f"{name}_after"]) for label, name, worse in rows
              if result.get(f"{name}_before") is not None and result.get(f"{name}_after") is not None]
    changes = [round(after - before, 4) for *_, before, after in losses]
    largest = max(map(abs, changes), default=0.0) or 1.0
    return [f"{label:<21}  before {before:.4f}  after {after:.4f}  {change:+z.4f}  "
            f"{'█' * round(BAR * abs(change) / largest):<{BAR}}  "
            f"{'unchanged' if not change else 'learned' if change < 0 else worse}"
            for (label, worse, before, after), change in zip(losses, changes)]
