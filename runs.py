"""Run directories: what a run is made of, whether it is finished, its log of steps, and its result.

A stage is whole or absent. Training works in `<out>.partial/`, which takes the name `<out>` when the final weights are
on disk; `run.json` in either says what the run is made of.
"""
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from model.files import UserError, explain_os_errors, read_json, write_json

# Settings that change how a run is carried out but none of its numbers, or (init and data) that a digest stands for.
OPERATIONAL = {"out", "init", "data", "micro_batch_tokens", "micro_step_slots", "gradient_checkpointing",
               "logging_steps", "save_total_limit", "local_rank", "zero"}
PACKAGES = ("torch", "deepspeed", "tokenizers", "sentencepiece", "safetensors", "numpy")


def git_commit():
    """The commit of this program, with "-dirty" where files were changed since; None outside a repository."""
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True,
                                cwd=Path(__file__).parent, capture_output=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(settings, parent_digest, data_digest, **facts):
    """What run.json says of a run before it starts: its settings (a dict), digests of what it was made from, facts."""
    return {"settings": settings, "parent_digest": parent_digest, "data_digest": data_digest, "commit": git_commit(),
            "python": sys.version.split()[0], "versions": {name: version(name) for name in PACKAGES}, **facts}


def history(checkpoint):
    """What was spent on a checkpoint, as its run.json or growth.json says; an empty dict where neither does.

    "flops": floating-point operations of training, those on the checkpoints before it included; "text": the text that
    was pretrained on and the place reached in its stream of samples, {data_digest, seed, seq_length, …, samples}.
    """
    found = [Path(checkpoint) / name for name in ("growth.json", "run.json") if (Path(checkpoint) / name).exists()]
    return read_json(found[0]).get("history", {}) if found else {}


def changed(old, new, ignored=()):
    """How two mappings differ, as sentences."""
    return [f"{name} is {old.get(name)!r} there and {new.get(name)!r} here"
            for name in sorted((old.keys() | new.keys()) - set(ignored)) if old.get(name) != new.get(name)]


def differences(run, path, defaults):
    """How a run differs from the one recorded in a run.json, as sentences; an empty list where it does not.

    A setting that was not there yet when the run was recorded had its default value.
    """
    recorded = read_json(path)
    found = changed(defaults | recorded.get("settings", {}), run["settings"], OPERATIONAL)
    return found + [f"{what} ({recorded.get(key)!s:.12} there, {run[key]!s:.12} here)"
                    for key, what in (("parent_digest", "it started from other weights"),
                                      ("data_digest", "it was trained on other data")) if recorded.get(key) != run[key]]


def is_finished(out, run, defaults):
    """Whether this run was finished before. Raises UserError where its directory belongs to other settings."""
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not (out / "run.json").exists():
        raise UserError(f"{out} exists and is no run of this program: remove it or choose another --out")
    for directory in (out, partial):
        if (directory / "run.json").exists() and (found := differences(run, directory / "run.json", defaults)):
            raise UserError(f"{directory} belongs to a run with other settings: {'; '.join(found)}. "
                            "Choose another --out, or remove it to train anew")
    return out.exists()


def start_run(out, run):
    """Makes `<out>.partial/`, the directory that a run works in, with its run.json; returns it.

    What an unfinished run has left there goes, but for checkpoints: those are kept under `<out>.partial.old/`.
    """
    partial = Path(out).with_name(Path(out).name + ".partial")
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
    write_json(partial / "run.json", run)
    return partial


def finish_run(out, partial, run):
    """Gives a run whose final weights are on disk its name, with the result in run.json."""
    write_json(partial / "run.json", run)
    with explain_os_errors(out):
        partial.rename(out)


class StepLog:
    """metrics.jsonl of a run: one JSON object a step, written through at once. Other ranks than 0 pass None."""

    def __init__(self, directory):
        self.file = None
        if directory is not None:
            with explain_os_errors(directory):
                self.file = open(Path(directory) / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def write(self, **values):
        if self.file:
            with explain_os_errors(self.file.name):
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()


def show(loss):
    """A loss for people; an empty evaluation split has none."""
    return "none" if loss is None else f"{loss:.4f}"


def clock(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def print_result(out):
    """Prints what a finished run came to: three test examples, eval loss before and after, the path."""
    result = read_json(Path(out) / "run.json")["result"]
    for index, example in enumerate(result["examples"], 1):
        for name, text in (("input", example["input"]), ("reference", example["output"]),
                           ("model", example["prediction"])):
            print(f"example {index} {name:>9}: {' '.join(text.split())}")
    print(f"{result['steps']} steps, {result['tokens']:,} tokens in {clock(result['seconds'])} "
          f"({result['tokens_per_s']:,.0f} tokens/s), padding {result['padding']:.1%}, "
          f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process")
    print(f"eval loss before {show(result['eval_loss_before'])}, after {show(result['eval_loss_after'])}")
    print(f"checkpoint: {out}", flush=True)
