"""What a run is made of: commit, versions, digests, lineage."""
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from common.files import UserError, digest, read_json

# Settings that change how a run is carried out but none of its numbers, or (init and data) that a digest stands for.
OPERATIONAL = {"out", "init", "data", "max_tokens_per_microbatch", "microbatch_overhead_tokens", "gradient_checkpointing",
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


def lineage(checkpoint):
    """What was spent on a checkpoint, as its run.json or growth.json says; an empty dict where neither does.

    "flops": floating-point operations of training, those on the checkpoints before it included; "text": the text that
    was pretrained on and the place reached in its stream of samples, {data_digest, seed, seq_length, …, samples};
    "tasks": those it was fine-tuned on, in order, [{task, data, data_digest, max_train_samples}].
    """
    found = [Path(checkpoint) / name for name in ("growth.json", "run.json") if (Path(checkpoint) / name).exists()]
    return read_json(found[0]).get("lineage", {}) if found else {}


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


def data_digest(path):
    """SHA-256 of a task file, or of a shard directory's meta.json, which holds the digests of the shards."""
    meta = Path(path) / "meta.json"
    if not Path(path).is_file() and not meta.is_file():
        raise UserError(f"{path} does not exist or is not a directory of token shards with a meta.json: make it with "
                        "data_prep.py text")
    return digest([path if Path(path).is_file() else meta])
