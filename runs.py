"""Run directories: what a run is made of, whether it is finished, its log of steps, and its result.

A stage is whole or absent. Training works in `<out>.partial/`, which takes the name `<out>` when the final weights are
on disk; `run.json` in either says what the run is made of.
"""
import fcntl
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from model.files import UserError, explain_os_errors, read_json, write_json, write_text

# Settings that change how a run is carried out but none of its numbers, or (init and data) that a digest stands for.
OPERATIONAL = {"out", "init", "data", "micro_batch_tokens", "micro_step_slots", "gradient_checkpointing",
               "logging_steps", "save_total_limit", "save_minutes", "timeout_minutes", "tensorboard", "wandb",
               "local_rank", "zero", "offload", "deepspeed", "method"}
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
    was pretrained on and the place reached in its stream of samples, {data_digest, seed, seq_length, …, samples};
    "tasks": those it was fine-tuned on, in order, [{task, data, data_digest, max_train_samples}].
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
    return found + [f"{what} ({recorded.get(key)!s:.12} there, {run.get(key)!s:.12} here)"
                    for key, what in (("parent_digest", "it started from other weights"),
                                      ("data_digest", "it was trained on other data"),
                                      ("rehearsed", "it trained on other data of earlier tasks again"))
                    if recorded.get(key) != run.get(key)]


def identity(run):
    """What two runs have to agree on to give the same weights."""
    settings = {name: value for name, value in run["settings"].items() if name not in OPERATIONAL}
    return {"settings": settings} | {key: run.get(key) for key in ("parent_digest", "data_digest", "rehearsed")}


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


class StepLog:
    """metrics.jsonl of a run: one JSON object a step, written through at once. Other ranks than 0 pass None.

    It is cut back to the `step` that the run goes on from, so that no step stands in it twice.
    """

    def __init__(self, directory, step=0, watchers=()):
        self.file, self.watchers = None, watchers
        if directory is not None:
            path = Path(directory) / "metrics.jsonl"
            write_text(path, "".join(logged_until(path, step)))
            with explain_os_errors(directory):
                self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, **values):
        if self.file:
            with explain_os_errors(self.file.name):
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()
            for log, _ in self.watchers:
                log(values)

    def close(self):
        for _, close in self.watchers:
            close()


def watchers(s, directory, run):
    """The services that a run is logged to beside metrics.jsonl: pairs of functions (log a step's values, close)."""
    found = []
    if s.tensorboard:
        writer = optional("tensorboard", "torch.utils.tensorboard").SummaryWriter(directory / "tensorboard")
        found.append((lambda values: [writer.add_scalar(name, value, values["step"]) for name, value in values.items()
                                      if isinstance(value, int | float)], writer.close))
    if s.wandb:
        session = optional("wandb").init(project=s.wandb, name=str(s.out), config=run["settings"], dir=directory,
                                         id=re.sub(r"\W+", "-", str(s.out)), resume="allow")
        found.append((lambda values: session.log(values, step=values["step"]), session.finish))
    return found


def optional(package, module=None):
    """A module of a package that is not among the requirements; a UserError says how to get it."""
    try:
        return importlib.import_module(module or package)
    except ImportError:
        raise UserError(f"--{package} needs the package {package}, which is not installed: pip install {package}") \
            from None


def logged_until(path, step):
    """The lines of a log up to a step; one that was cut short by a crash is left out with what follows it."""
    if not step or not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            logged = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            return
        if logged > step:
            return
        yield line


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
          f"({result['tokens_per_s']:,.0f} tokens/s), "
          f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process")
    print(f"eval loss before {show(result['eval_loss_before'])}, after {show(result['eval_loss_after'])}")
    print(f"checkpoint: {out}", flush=True)
