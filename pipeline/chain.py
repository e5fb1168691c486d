"""The chain of stages: the order of the tasks, and the directory, initial checkpoint and command of each stage.

Imports no installed package, since make uses this module before they are installed.
"""
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.configs import CONFIGS, ROOT, read_config
from common.files import UserError
from pipeline.jobs import optional_flags

ORDER = "simp", "empd", "inqqg", "exp", "hgen"
EXPERIMENT_ORDER = ORDER[:3]  # the tasks of an experiment, unless others are given
PAIR = "llm", "stack"  # the models that are compared, and that are published
# What m0 may be: from scratch, the shallow base trained further, or grown by an operator (model/growth.py).
MODELS = "llm", "base", "stack", "interleave", "middle", "solar"


# STAGE_SETTINGS of train.py identify a stage. A method may not set them, nor the replayed text (an input of the stage),
# nor flags that are not settings.
STAGE_SETTINGS = {"task", "size", "phase", "init", "data", "out", "seed", "method", "local_rank"}
NOT_OF_METHODS = STAGE_SETTINGS | {"replay_text", "config", "help", "show_settings"}


@dataclass(frozen=True)
class FinetuneStage:
    """Fine-tuning of the checkpoint `parent` on a task makes the checkpoint `out`."""
    task: str
    parent: str | Path
    out: Path


def finetune_stages(order: Iterable[str], start: str | Path, folder: Path) -> list[FinetuneStage]:
    """The stages of a chain: the first starts from the checkpoint `start`, each later one from the stage before it."""
    stages: list[FinetuneStage] = []
    for number, task in enumerate(order, 1):
        stages.append(FinetuneStage(task, stages[-1].out if stages else start, folder / f"m{number}-{task}"))
    return stages


def chain_folder(folder: Path, method: str | None = None, rate: float | None = None, seed: int | None = None) -> Path:
    """The folder of a chain's stages, given the folder of the model. A method, learning rate or seed has its own."""
    folder = folder / method.replace(":", "-") if method else folder
    folder = folder if rate is None else folder / f"rate-{rate:g}"
    return folder if seed is None else folder / f"seed-{seed}"


def check_order(stages: Iterable[Path], order: Iterable[str], choose: str) -> None:
    """Raises UserError if the folder of a chain has a stage of the same number as one of `stages`, of another task.

    choose: what names another folder.
    """
    for stage in stages:
        for other in sorted(stage.parent.glob(f"{stage.name.partition('-')[0]}-*")):
            if other != stage and re.fullmatch(r"[\w-]+", other.name):
                raise UserError(f"{other} is a stage of another order of tasks than {', '.join(order)}: choose another "
                                f"{choose}, or remove it")


def method_flags(method: str) -> list[str]:
    """The flags for train.py of a method such as ewc:ewc_strength=10: a file in configs/method, and settings that
    override it. Raises UserError if they are not settings that a method may have."""
    name, *settings = method.split(":")
    if "/" in method:
        raise UserError(f"the method {method!r} names a folder, so that it may have no '/': give paths in ARGS, or in "
                        "train_args")
    flags = ["--method", name]
    for setting in settings:
        key, _, value = setting.partition("=")
        if not value or key in NOT_OF_METHODS:
            raise UserError(f"{setting!r} is not name=value of a setting that a method may have"
                            + (": the text that is replayed is TEXT, or --text" if key == "replay_text" else ""))
        flags += [f"--{key}", value]
    return flags


def method_settings(method: str) -> set[str]:
    """The names of the settings that a method such as ewc:ewc_strength=10 sets."""
    name, *settings = method.split(":")
    return {*read_config("method", name), *(setting.partition("=")[0] for setting in settings)}


def finetune_command(launcher: Sequence[str], stage: FinetuneStage, data: str | Path, size: str | None,
                     flags: Sequence[object]) -> list[object]:
    """The command of a stage. `launcher` holds the words before train.py; data: the preprocessed task file."""
    return [*launcher, ROOT / "train.py", "--config", CONFIGS / "train/finetune.toml", *optional_flags(size=size),
            "--task", stage.task, "--init", stage.parent, "--data", data, "--out", stage.out, *flags]


def hub_id(size: str | None, model: str) -> str | None:
    """The Hub id of the published m0 of a size, or None if m0 has to be pretrained."""
    return read_config("size", size).get("hub", {}).get(model) if size else None


def download_command(python: str, hub: str, out: Path) -> list[object]:
    """The command that makes m0 from published weights."""
    return [python, "-m", "model.hub", "--source", hub, "--out", out]


def pretrain_command(python: str, size: str, model: str, text: str | Path, folder: Path,
                     flags: Sequence[object]) -> list[object]:
    """The command that pretrains m0 in the folder of a model, on a directory of token shards."""
    return [python, ROOT / "pretrain.py", "--size", size, "--model", model, "--data", text, "--out", folder, *flags]


def evaluate_command(launcher: Sequence[str], checkpoint: str | Path, out: Path | None, data: str | Path,
                     tasks: Iterable[str], flags: Sequence[object]) -> list[object]:
    """The command that evaluates a checkpoint. data: the folder of the preprocessed task files."""
    return [*launcher, ROOT / "evaluate.py", *optional_flags(
        checkpoint=checkpoint, out=out, data=data, tasks=",".join(dict.fromkeys(tasks))), *flags]
