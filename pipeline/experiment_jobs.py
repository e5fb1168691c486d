"""The jobs of experiment.py: m0 of each model of each pair, the stages of its chains, and their evaluations."""
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.configs import CONFIGS, read_config
from common.files import UserError
from common.settings import config_files
from corpus.shards import WINDOW_TOKENS
from evaluation.suites import open_suite
from model.config import ModelConfig, size_config
from model.hub import source_config
from pipeline import chain
from pipeline.costs import EvaluationWork, evaluate_flops, finetune_flops
from pipeline.experiment_config import ExperimentConfig, evaluate_settings, train_settings
from pipeline.jobs import Job, optional_flags, split_words
from pipeline.pretraining import base_depth, held_out_loss, run_flops

DEFAULT_SEED = 42  # of pretraining, without pairs


@dataclass(frozen=True)
class Arm:
    """One model of one pair: the folder of its stages, and how its m0 is made."""
    folder: Path
    model: str  # as in chain.MODELS
    pair: int | None  # pretraining seed; None without pairs
    level_with: str | None = None  # the model of the pair whose held-out loss its m0 is trained further to reach


def pair_jobs(cfg: ExperimentConfig, pair: int | None) -> list[Job]:
    """The jobs of one pair, in order."""
    return [job for arm in arms(cfg, pair) for job in arm_jobs(cfg, arm)]


def arms(cfg: ExperimentConfig, pair: int | None) -> list[Arm]:
    """The models of a pair, and with the loss control the one of llm and stack with the higher loss, trained further.

    Which of them is behind is known only when both m0 are finished; before that it is taken to be llm.
    """
    folder = Path(cfg.out) if pair is None else Path(cfg.out) / f"pair-{pair}"
    found = [Arm(folder / model, model, pair) for model in cfg.models]
    if "loss" in cfg.controls:
        starts = {model: folder / model / "m0" for model in chain.PAIR}
        are_finished = all(start.exists() for start in starts.values())
        behind = max(starts, key=lambda model: held_out_loss(starts[model])) if are_finished else "llm"
        ahead, = set(chain.PAIR) - {behind}
        found.append(Arm(folder / f"{behind}-level", behind, pair, ahead))
    return found


def arm_jobs(cfg: ExperimentConfig, arm: Arm) -> list[Job]:
    """The jobs of one model: m0, then the stages of each method, rate and seed. Each is evaluated before the next."""
    jobs: list[Job] = []
    if (start := cfg.init(arm.model)) is None:
        jobs.append(m0_job(cfg, arm))
    m0 = start or arm.folder / "m0"
    jobs.append(evaluation_job(cfg, arm, m0))
    for method in cfg.each_method:
        for rate in (*sorted(cfg.rates),) or (None,):
            for seed in cfg.seeds:
                jobs += chain_jobs(cfg, arm, m0, method, rate, seed)
    return jobs


def chain_jobs(cfg: ExperimentConfig, arm: Arm, m0: str | Path, method: str | None, rate: float | None,
               seed: int) -> list[Job]:
    """The jobs of one chain from m0: the stages with one method, learning rate and seed."""
    place = chain.chain_folder(arm.folder, method, rate, None if seed == cfg.seeds[0] else seed)
    flags = chain.method_flags(method) if method else []
    settings = [train_settings(cfg, method, args) for args in cfg.each_stage_args]
    recipe = [CONFIGS / "train/finetune.toml", *size_files(cfg)]
    recipe += [CONFIGS / f"method/{settings[0].method}.toml"] if method else []
    shared = ["--learning_rate", rate] if rate else []
    sampled = ["--posterior_samples", cfg.posterior_samples] if settings[0].optimizer == "ivon" else []
    jobs, stages = [], chain.finetune_stages(cfg.order, m0, place)
    for stage, args, own in zip(stages, cfg.each_stage_args, settings):
        given = [*split_words(cfg.train_args), *split_words(args)]
        data = Path(cfg.data) / f"{stage.task}.json"
        replay = ["--replay_text", own.replay_text] if own.replay_share else []
        command = chain.finetune_command(launcher_words(cfg), stage, data, cfg.size, [
            "--seed", seed, *given, *flags, *replay, *shared])
        files = map(Path, filter(None, (*config_files(given), own.deepspeed, *replay[1:])))
        jobs.append(Job(stage.out, command, finetune_flops(model_config(cfg, arm.model), data, own),
                        (stage.parent, data, *recipe, *files)))
        jobs.append(evaluation_job(cfg, arm, stage.out, m0, sampled, rate in (None, cfg.shared_rate)))
    return jobs


def m0_job(cfg: ExperimentConfig, arm: Arm) -> Job:
    """The job that makes m0: pretraining by the recipe of the size, or a download from the Hub."""
    out = arm.folder / "m0"
    if hub := chain.hub_id(cfg.size, arm.model):
        if arm.pair is not None or arm.level_with:
            raise UserError(f"the m0 of the size {cfg.size} is published, so that there is one pair of it: leave out "
                            "pairs and the loss control")
        return Job(out, chain.download_command(sys.executable, hub, out), 0.0)
    if not (cfg.size and cfg.text):
        raise UserError(f"m0 of {arm.model} has to be pretrained: give --text, or --init_{arm.model}")
    flags: list[object] = ["--seed", DEFAULT_SEED if arm.pair is None else arm.pair]
    inputs: list[Path] = []
    if arm.level_with:
        inputs = [arm.folder.parent / model / "m0" for model in (arm.model, arm.level_with)]
        flags += ["--init", inputs[0], "--level_with", inputs[1]]
    command = chain.pretrain_command(sys.executable, cfg.size, arm.model, cfg.text, arm.folder, [
        *flags, *optional_flags(launcher=cfg.launcher)])
    return Job(out, command, run_flops(cfg.size, "llm"),
               (*inputs, Path(cfg.text), CONFIGS / "train/pretrain.toml", *size_files(cfg)))


def evaluation_job(cfg: ExperimentConfig, arm: Arm, checkpoint: str | Path, m0: str | Path | None = None,
                   sampled: Sequence[object] = (), whole: bool = True) -> Job:
    """The evaluation of a checkpoint: held-out text, references of all tasks of the order, and if `whole` also the
    decoding of the test sets and the suite, if there is one. m0: what a stage's KL divergence is measured from; None:
    the checkpoint is m0."""
    tasks, data = list(dict.fromkeys(cfg.order)), Path(cfg.data)
    out = (Path(checkpoint) if m0 else arm.folder / "m0") / "eval"
    flags: list[object] = [] if whole else ["--decode", "false"]
    inputs: list[str | Path] = [checkpoint, *([m0] if m0 else []), *([Path(cfg.text)] if cfg.text else [])]
    inputs += [file for task in tasks for file in (data / f"{task}.json", CONFIGS / f"task/{task}.toml")]
    files: list[Path] = []  # of the suite
    if whole and cfg.suite:
        path, entries, folder = open_suite(cfg.suite, cfg.suite_files)
        files = [folder / name for name in dict.fromkeys(entry["file"] for entry in entries if "file" in entry)]
        flags += [*optional_flags(suite=cfg.suite, suite_files=cfg.suite_files), *sampled]
        inputs += [path, *files]
    given = split_words(cfg.evaluate_args)
    inputs += map(Path, config_files(given))
    command = chain.evaluate_command(launcher_words(cfg), checkpoint, out, cfg.data, tasks, [
        *optional_flags(text=cfg.text, reference=m0), *flags, *given])
    settings = evaluate_settings(cfg)
    windows = math.inf if settings.limit is None else settings.limit * (settings.text_length or WINDOW_TOKENS)
    work = EvaluationWork(data, tasks, files, settings.limit, min(settings.text_tokens, windows) if cfg.text else 0,
                          models=2 if m0 else 1, decodes=whole)
    return Job(out, command, evaluate_flops(model_config(cfg, arm.model), work), tuple(inputs))


def size_files(cfg: ExperimentConfig) -> list[Path]:
    """The file of the size preset, if a size is given."""
    return [CONFIGS / f"size/{cfg.size}.toml"] if cfg.size else []


def launcher_words(cfg: ExperimentConfig) -> list[str]:
    """The words before a script. A Slurm job runs experiment.py again with its own launcher."""
    return split_words(cfg.launcher) if cfg.launcher not in ("", "slurm") else [sys.executable]


@functools.cache
def model_config(cfg: ExperimentConfig, model: str) -> ModelConfig:
    """The configuration of a model."""
    if init := cfg.init(model):
        return source_config(init)
    assert cfg.size  # see problems()
    if "model" not in read_config("size", cfg.size) and (hub := chain.hub_id(cfg.size, model)):
        made = Path(cfg.out) / model / "m0/config.json"
        return ModelConfig.read(made) if made.exists() else source_config(hub)
    return size_config(cfg.size, base_depth(cfg.size) if model == "base" else None)
