"""The experiment: both models through all tasks, every stage evaluated, and the report.

    python experiment.py --size tiny --text data/text/tiny --data data/prepared/sample --out runs/tiny
    python experiment.py … --init_llm DIR --init_stack DIR        your own checkpoints instead of pretrained ones
    python experiment.py … --order simp,empd,simp --seeds 42,43   a task may come again; each seed is a chain from m0
    python experiment.py … --methods finetune,ewc,vcl:tau=0.5     a chain for each method against forgetting

Each job is a separate command, which is printed. A job is repeated only if its command, its initial weights or its data
have changed since, according to the digests in experiment/*.json. An interrupted experiment continues where it stopped.
"""
import common.interrupts

import dataclasses
import functools
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.files import UserError, check_writable, read_json
from common.formatting import format_duration
from common.metrics_log import check_services
from common.settings import CONFIGS, ROOT, known, load, read_config, run, setting
from evaluation.evaluate_config import EvaluateConfig
from evaluation.suites import open_suite
from evaluation.test_sets import task_decoding
from model.config import ModelConfig
from model.hub import fetch_checkpoint
from pipeline import chain
from pipeline.costs import Pace, evaluate_flops, finetune_flops, matmul_speed
from pipeline.jobs import (
    Job,
    further_flags,
    optional_flags,
    read_slurm_template,
    run_command,
    split_words,
    submit_command,
)
from pipeline.ledger import Ledger
from pipeline.pretraining import size_config
from training.deepspeed_config import resolve_zero_stage
from training.train_config import TrainConfig

UTILISATION = 0.3  # share of a matrix product's speed that training and evaluation reach, for the first estimate

# The settings that identify a stage or an evaluation.
STAGE_SETTINGS = {"task", "size", "phase", "init", "data", "out", "seed", "method", "local_rank"}
EVALUATION_SETTINGS = {"checkpoint", "out", "data", "tasks", "suite", "suite_files", "posterior_samples"}


@dataclass(frozen=True)
class ExperimentConfig:
    """Settings of an experiment."""
    size: str | None = setting(None, "size preset (a file in configs/size): m0 and the recipe of fine-tuning",
                               names="size")
    models: tuple[str, ...] = setting(chain.MODELS, "models: llm, stack (grown)", required=True, names=chain.MODELS)
    order: tuple[str, ...] = setting(chain.SAMPLE_ORDER, "tasks in the order of the stages; one may come again",
                                     required=True, names="task")
    seeds: tuple[int, ...] = setting((42,), "seeds of fine-tuning; all but the first have a folder seed-<n>",
                                     required=True, at_least=0)
    methods: tuple[str, ...] = setting((), "files in configs/method, each a separate chain from m0; settings of "
                                           "train.py may follow: ewc:ewc_strength=10; none: one chain, by "
                                           "configs/train/finetune.toml")
    text: str | None = setting(None, "directory of token shards that m0 is pretrained on")
    data: str = setting(None, "folder of the preprocessed task files, <task>.json", required=True)
    out: str = setting(None, "folder of the models, such as runs/tiny", required=True)
    init_llm: str | None = setting(None, "checkpoint to use as the m0 of llm: a directory or a Hub id")
    init_stack: str | None = setting(None, "checkpoint to use as the m0 of stack")
    suite: str = setting("sample", "suite of benchmarks, as for evaluate.py")
    suite_files: str | None = setting(None, "folder of the suite's local files")
    report: str = setting("report", "folder of the report")
    launcher: str = setting("", "words before the scripts, such as 'torchrun --nproc_per_node 8'; none: one process; "
                                "slurm: a Slurm job for each job")
    gpus: int = setting(8, "GPUs, and processes, of a Slurm job", at_least=1)
    slurm_file: str = setting("configs/slurm/step.sbatch", "script of a Slurm job, with the placeholder @COMMAND@")
    only: str | None = setting(None, "run only the job that makes this directory, and no report")
    train_args: str = setting("", "flags for every fine-tuning, such as '--max_train_samples 400'")
    evaluate_args: str = setting("", "flags for every evaluation, such as '--limit 150'")
    posterior_samples: int = setting(4, "weight samples for also evaluating stages trained with IVON", at_least=0)
    dry_run: bool = setting(False, "print the plan and run nothing")

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = [f"{name} names one twice" for name in ("models", "seeds", "methods")
                 if len(set(getattr(self, name))) < len(getattr(self, name))]
        found += [f"{model} has no --init_{model}, and --size is missing" for model in self.models
                  if model in chain.MODELS and not self.size and not getattr(self, f"init_{model}")]
        checks: list[Callable[[], object]] = [functools.partial(evaluate_settings, self)]
        if self.size is None or self.size in known("size"):
            checks += [functools.partial(train_settings, self, method) for method in self.methods or [None]]
        for check in checks:
            try:
                check()
            except UserError as error:
                found.append(str(error))
        return found


def method_flags(method: str) -> list[str]:
    """The flags for train.py of a method such as ewc:ewc_strength=10: a file in configs/method, and settings that
    override it. Raises UserError if they are not the names and values of settings."""
    name, *parts = method.split(":")
    flags = ["--method", name]
    if "/" in method:
        raise UserError("it names a folder, so that it may have no '/'; give paths in train_args")
    for part in parts:
        key, _, value = part.partition("=")
        if not value or key not in {field.name for field in dataclasses.fields(TrainConfig)} - STAGE_SETTINGS:
            raise UserError(f"{part!r} is not name=value of a setting that a method may have")
        flags += [f"--{key}", value]
    return flags


def train_settings(cfg: ExperimentConfig, method: str | None) -> TrainConfig:
    """The settings of the stages with a method, apart from those that identify a stage. Raises UserError if train_args
    or the method is not valid."""
    try:
        return load(TrainConfig, [
            "--config", str(CONFIGS / "train/finetune.toml"), *optional_flags(size=cfg.size), "--task", chain.ORDER[0],
            "--init", "x", "--data", "x", "--out", "x", *further_flags(cfg.train_args, STAGE_SETTINGS),
            *(method_flags(method) if method else [])])
    except UserError as error:
        origins = [*(["train_args"] if cfg.train_args else []), *([f"the method {method!r}"] if method else [])]
        raise UserError(f"{' and '.join(origins) or 'train.py'}: {error}") from None


def evaluate_settings(cfg: ExperimentConfig) -> EvaluateConfig:
    """The settings of the evaluations, apart from those that identify one. Raises UserError if evaluate_args is not
    valid."""
    try:
        return load(EvaluateConfig, [
            "--checkpoint", "x", "--suite", cfg.suite, "--posterior_samples", str(cfg.posterior_samples),
            *further_flags(cfg.evaluate_args, EVALUATION_SETTINGS)])
    except UserError as error:
        raise UserError(f"{'evaluate_args' if cfg.evaluate_args else 'evaluate.py'}: {error}") from None


def model_jobs(cfg: ExperimentConfig, model: str) -> list[Job]:
    """The jobs of one model: m0, then the stages of each method and seed. Each is evaluated before the next."""
    folder, jobs, start = Path(cfg.out) / model, [], getattr(cfg, f"init_{model}")
    if start is None:
        start = folder / "m0"
        jobs.append(m0_job(cfg, model, start))
    jobs.append(evaluation_job(cfg, model, start, folder / "m0"))
    for method in cfg.methods or [None]:
        for seed in cfg.seeds:
            place = chain.chain_folder(folder, method, None if seed == cfg.seeds[0] else seed)
            jobs += chain_jobs(cfg, model, chain.finetune_stages(cfg.order, start, place), method, seed)
    return jobs


def chain_jobs(cfg: ExperimentConfig, model: str, stages: list[chain.FinetuneStage], method: str | None,
               seed: int) -> list[Job]:
    """The jobs of one chain from m0: the stages with one method and one seed."""
    flags, settings = method_flags(method) if method else [], train_settings(cfg, method)
    recipe = [CONFIGS / "train/finetune.toml", *size_files(cfg)]
    recipe += [CONFIGS / f"method/{settings.method}.toml"] if method else []
    sampled = ["--posterior_samples", cfg.posterior_samples] if settings.optimizer == "ivon" else []
    jobs = []
    for stage in stages:
        data = Path(cfg.data) / f"{stage.task}.json"
        first = ["--rehearsal", "0"] if stage is stages[0] and settings.rehearsal else []
        command = chain.finetune_command(launcher_words(cfg), stage, data, cfg.size, [
            "--seed", seed, *split_words(cfg.train_args), *flags, *first])
        jobs.append(Job(stage.out, command, finetune_flops(model_config(cfg, model), data, settings),
                        "train.py", (stage.parent, data, *recipe)))
        jobs.append(evaluation_job(cfg, model, stage.out, stage.out, sampled))
    return jobs


def m0_job(cfg: ExperimentConfig, model: str, out: Path) -> Job:
    """The job that makes m0: pretraining by the recipe of the size, or a download from the Hub."""
    if hub := chain.hub_id(cfg.size, model):
        return Job(out, chain.download_command(sys.executable, hub, out), 0.0, "model.hub")
    if not (cfg.size and cfg.text):
        raise UserError(f"m0 of {model} has to be pretrained: give --text, or --init_{model}")
    command = chain.pretrain_command(sys.executable, cfg.size, model, cfg.text, out.parent, cfg.launcher)
    return Job(out, command, read_config("size", cfg.size).get(model, {}).get("max_flops", 0.0), "pretrain.py",
               (Path(cfg.text), CONFIGS / "train/pretrain.toml", *size_files(cfg)))


def evaluation_job(cfg: ExperimentConfig, model: str, checkpoint: str | Path, directory: Path,
                   sampled: list[object] | tuple = ()) -> Job:
    """The evaluation of a checkpoint on all tasks of the order and the suite."""
    tasks = list(dict.fromkeys(cfg.order))
    path, entries, folder = open_suite(cfg.suite, cfg.suite_files)
    files = [folder / name for name in dict.fromkeys(entry["file"] for entry in entries if "file" in entry)]
    command = chain.evaluate_command(launcher_words(cfg), checkpoint, directory / "eval", cfg.data, tasks, [
        *optional_flags(suite=cfg.suite, suite_files=cfg.suite_files), *sampled, *split_words(cfg.evaluate_args)])
    inputs = [file for task in tasks for file in (Path(cfg.data) / f"{task}.json", CONFIGS / f"task/{task}.toml")]
    flops = evaluate_flops(model_config(cfg, model), Path(cfg.data), tasks, files, evaluate_settings(cfg).limit)
    return Job(directory / "eval", command, flops, "evaluate.py", (checkpoint, *inputs, path, *files))


def size_files(cfg: ExperimentConfig) -> list[Path]:
    """The file of the size preset, if a size is given."""
    return [CONFIGS / f"size/{cfg.size}.toml"] if cfg.size else []


def launcher_words(cfg: ExperimentConfig) -> list[str]:
    """The words before a script. A Slurm job runs this script again with its own launcher."""
    return split_words(cfg.launcher) if cfg.launcher not in ("", "slurm") else [sys.executable]


@functools.cache
def model_config(cfg: ExperimentConfig, model: str) -> ModelConfig:
    """The configuration of a model."""
    if init := getattr(cfg, f"init_{model}"):
        return ModelConfig.read(fetch_checkpoint(init) / "config.json")
    assert cfg.size  # see problems()
    return size_config(cfg.size)


def report_command(cfg: ExperimentConfig) -> list[str]:
    """The command that makes the report."""
    return [sys.executable, str(ROOT / "report.py"), "--runs", cfg.out, "--out", cfg.report]


def check_before_running(cfg: ExperimentConfig, to_do: list[Job]) -> None:
    """Raises UserError for what some later job or the report would stumble over: packages and files that the settings
    name, the length of samples, the suite, folders to write to."""
    training = [train_settings(cfg, method) for method in cfg.methods or [None]]
    for settings in training:
        check_services(settings.tensorboard, settings.wandb)
        resolve_zero_stage(settings, 1)  # reads the DeepSpeed file
    lengths = [settings.max_source_length + settings.max_target_length for settings in training] + [
        evaluate_settings(cfg).max_source_length + task_decoding(task, 0).max_new_tokens for task in cfg.order]
    limit = min(model_config(cfg, model).max_position_embeddings for model in cfg.models)
    if max(lengths) > limit:
        raise UserError(f"samples may have {max(lengths)} tokens, more than the model's max_position_embeddings "
                        f"{limit}: lower max_source_length in train_args or evaluate_args")
    if any(job.script == "evaluate.py" for job in to_do):
        from evaluation.lm_eval_tasks import read_suite  # lm-eval takes seconds to import
        read_suite(cfg.suite, cfg.suite_files)
    for folder in (cfg.out, cfg.report, *(str(job.out) for job in to_do)):
        check_writable(folder)


def submit(cfg: ExperimentConfig, jobs: list[Job], ledger: Ledger) -> None:
    """Submits a Slurm job for each job, after the one that makes its initial checkpoint, then one for the report.

    A Slurm job runs this script again with --only, so that the job is recorded in the ledger.
    """
    template, folder = read_slurm_template(cfg.slurm_file), Path(cfg.out) / "slurm"
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name != "slurm_file"
              and getattr(cfg, field.name) != field.default}
    values["launcher"] = f"bash {shlex.quote(str(ROOT / 'configs/slurm/launch.sh'))}"
    flags = [f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for name, value in values.items()]
    numbers: dict[str, str] = {}  # of the Slurm jobs, by the directory that each makes
    for job in jobs:
        parent = numbers.get(str(job.inputs[0])) if job.inputs else None
        command = [sys.executable, str(ROOT / "experiment.py"), *flags, "--only", str(job.out)]
        numbers[str(job.out)] = submit_command(command, folder / f"{ledger.name(job)}.sh", template, cfg.gpus,
                                               parent and f"afterok:{parent}")
    submit_command(report_command(cfg), folder / "report.sh", template, cfg.gpus,
                   "afterany:" + ":".join(numbers.values()) if numbers else None)
    print(f"{len(numbers) + 1} jobs submitted; their scripts and logs: {folder}")


def run_unfinished(jobs: list[Job], ledger: Ledger, pace: Pace) -> list[str]:
    """Runs the jobs that are missing or changed, in order, and records them.

    Returns the directories of incomplete evaluations: some benchmark's dataset cannot be downloaded, but later jobs do
    not depend on it. If another job fails, this process exits with its status.
    """
    to_do, incomplete = [job for job in jobs if not ledger.unchanged(job)], []
    for number, job in enumerate(jobs, 1):
        if ledger.unchanged(job):
            continue
        remaining = [later for later in jobs[number - 1:] if later in to_do]
        print(f"[{number}/{len(jobs)}] {job.out}, about {format_duration(pace.seconds(remaining))} left in all\n"
              f"{shlex.join(job.argv)}", flush=True)
        began = time.time()
        try:
            run_command(job.argv)
        except SystemExit:
            results = job.out.glob("results_*.json") if job.script == "evaluate.py" else ()
            if not any(path.stat().st_mtime >= began and read_json(path, dict).get("missing") for path in results):
                raise
            incomplete.append(str(job.out))  # the results of all available benchmarks are written
        else:
            pace.add(job, time.time() - began)
            ledger.add(job)
    return incomplete


def main(cfg: ExperimentConfig) -> None:
    """Prints the plan, runs the jobs that are missing or changed, and writes the report."""
    jobs, ledger = [job for model in cfg.models for job in model_jobs(cfg, model)], Ledger(cfg.out)
    if cfg.only and not (jobs := [job for job in jobs if str(job.out) == cfg.only]):
        raise UserError(f"no job of this experiment makes {cfg.only}")
    pace, to_do = Pace(UTILISATION * matmul_speed()), [job for job in jobs if not ledger.unchanged(job)]
    for number, job in enumerate(jobs, 1):
        print(f"  {number:>3}  {job.out}: " + (f"{job.flops / 1e12:.2f} TFLOP" if job in to_do else "complete"))
    print(f"{len(jobs)} jobs, {len(to_do)} of them to do; about {format_duration(pace.seconds(to_do))} at "
          f"{UTILISATION:.0%} of a matrix product's speed on one device of this machine", flush=True)
    if cfg.dry_run:
        return
    check_before_running(cfg, to_do)
    if cfg.launcher == "slurm":
        return submit(cfg, to_do, ledger)
    incomplete = run_unfinished(jobs, ledger, pace)
    if not cfg.only:
        try:
            run_command(report_command(cfg))
        except SystemExit:
            if not incomplete:
                raise
    if incomplete:
        raise UserError(f"{len(incomplete)} evaluations are incomplete: {', '.join(incomplete)}. Each said why above; "
                        "run the same command again to repeat them")


if __name__ == "__main__":
    run((ExperimentConfig, main), __doc__)
