"""The experiment: both models through all tasks, every stage evaluated, and the report.

    python experiment.py --size tiny --text data/text/tiny --data data/prepared/sample --out runs/tiny
    python experiment.py … --init_llm DIR --init_stack DIR        your own checkpoints instead of pretrained ones
    python experiment.py … --order simp,empd,simp --seeds 42,43   a task may be repeated; each seed is a chain from m0
    python experiment.py … --methods finetune,ewc,vcl:tau=0.5     a chain for each method against forgetting
    python experiment.py … --pairs 1,2,3 --rates 3e-4,1e-3        three pretraining seeds, two learning rates

Each job is a separate command, which is printed. A job is repeated if its command or one of its inputs (checkpoints,
data, configuration files) has changed, according to the digests in experiment/*.json, or if a file that it made is
missing. An interrupted experiment continues where it stopped.
Pairs do not depend on each other: two commands with different --pairs and the same --out may run at the same time.
"""
import common.preamble

import dataclasses
import hashlib
import itertools
import json
import shlex
import sys
import time
from pathlib import Path

from analysis.measures import primary_file, read_primary, write_primary
from common.configs import ROOT, read_config
from common.files import UserError
from common.formatting import format_duration
from common.metrics_log import check_services
from common.scripts import run
from common.writing import check_writable, write_text
from corpus.shards import WINDOW_TOKENS, ShardDataset
from corpus.tasks import first_items, lacking_source
from evaluation.result_files import MISSING
from evaluation.test_sets import task_decoding
from pipeline.chain import PAIR, check_order
from pipeline.costs import Pace, machine_speed, read_splits
from pipeline.experiment_config import (
    ExperimentConfig,
    all_train_settings,
    evaluate_settings,
    length_notes,
    train_settings,
)
from pipeline.experiment_jobs import arms, m0_job, model_config, pair_jobs
from pipeline.jobs import Job, read_slurm_template, run_command, submit_command
from pipeline.ledger import Ledger, ledger_entry
from pipeline.plan import trained_parameters
from training.deepspeed_config import resolve_choices
from training.selection import NEW_LAYERS

UTILISATION = 0.3  # share of a matrix product's speed that training and evaluation reach, for the first estimate


def report_command(cfg: ExperimentConfig) -> list[str]:
    """The command that makes the report. Without llm or stack, the first of the other models is compared with llm, or
    else with the first model."""
    reference = "llm" if "llm" in cfg.models else cfg.models[0]
    others = [model for model in cfg.models if model != reference]
    compared = [] if set(PAIR) <= set(cfg.models) or not others else ["--grown", others[0], "--reference", reference]
    return [sys.executable, str(ROOT / "report.py"), "--runs", cfg.out, "--out", cfg.report, *compared]


def record_primary(cfg: ExperimentConfig) -> None:
    """Records the primary measure before the first run. Raises UserError if another one was recorded."""
    recorded = read_primary(primary_file(cfg.out))
    if recorded is None:
        write_primary(primary_file(cfg.out), cfg.primary)
    elif recorded != cfg.primary:
        raise UserError(f"the primary measure of {cfg.out} is {recorded!r}, as named before its first run, not "
                        f"{cfg.primary!r}: give --primary {shlex.quote(recorded)}; report.py shows any other one")


def check_before_running(cfg: ExperimentConfig, to_do: list[Job]) -> None:
    """Raises UserError for problems that a later job or the report would fail on."""
    check_train_settings(cfg)
    check_sources(cfg)
    for model, method in itertools.product(cfg.models, cfg.each_method):
        check_trained(cfg, model, method)
    context = min(model_config(cfg, model).max_position_embeddings for model in cfg.models)
    check_lengths(cfg, context)
    check_text(cfg, context)
    if cfg.suite and any(job.script == "evaluate.py" for job in to_do):
        check_suite_files(cfg.suite, cfg.suite_files)
    check_order((job.out for job in to_do if job.script == "train.py"), cfg.order, "--out")
    for folder in (cfg.out, cfg.report, *(str(job.out) for job in to_do)):
        check_writable(folder)


def check_train_settings(cfg: ExperimentConfig) -> None:
    """Raises UserError if a package, a DeepSpeed file or a text to replay that the stages need is missing."""
    for settings in all_train_settings(cfg):
        check_services(settings.tensorboard, settings.wandb)
        resolve_choices(settings, 1)  # reads the DeepSpeed file
        if settings.replay_share and not Path(str(settings.replay_text)).is_dir():
            raise UserError(f"{settings.replay_text} is not a directory of token shards, from which text is replayed: "
                            "make one with data_prep.py text, and give it as --text")


def check_sources(cfg: ExperimentConfig) -> None:
    """Raises UserError if a test set is empty, or is judged by SARI and has an item without a source."""
    evaluated = evaluate_settings(cfg)
    for task in dict.fromkeys(cfg.order):
        path, spec = Path(cfg.data) / f"{task}.json", read_config("task", task)
        items = first_items(read_splits(path)["test"], evaluated.limit)
        if not items:
            raise UserError(f"{path}: the test set is empty, on which every stage is evaluated")
        if evaluated.decode and spec.get("sari") and (problem := lacking_source(items, spec["source"])):
            raise UserError(f"{path}: {problem[0]}")


def check_trained(cfg: ExperimentConfig, model: str, method: str | None) -> None:
    """Raises UserError if a model does not have the parameters that its first stage trains."""
    settings = train_settings(cfg, method, cfg.each_stage_args[0])
    if NEW_LAYERS in settings.train and not settings.new_layers:
        return  # those of a grown m0 are not known yet
    try:
        trained_parameters(model_config(cfg, model), settings)
    except UserError as error:
        raise UserError(f"{model}{f' with {method}' if method else ''}: {error}") from None


def check_lengths(cfg: ExperimentConfig, context: int) -> None:
    """Raises UserError if samples may be longer than the context of the models."""
    evaluated = evaluate_settings(cfg)
    lengths = [settings.max_source_length + settings.max_target_length for settings in all_train_settings(cfg)]
    lengths += [evaluated.max_source_length + evaluated.max_target_length, evaluated.text_length or 0]
    if evaluated.decode:
        lengths += [evaluated.max_source_length + task_decoding(task, 0).max_new_tokens for task in cfg.order]
    if max(lengths) > context:
        raise UserError(f"samples may have {max(lengths)} tokens, more than the model's max_position_embeddings "
                        f"{context}: lower max_source_length, max_target_length or text_length in train_args or "
                        "evaluate_args")


def check_text(cfg: ExperimentConfig, context: int) -> None:
    """Raises UserError if no window of the held-out text is evaluated, or if the text has none."""
    evaluated = evaluate_settings(cfg)
    window = evaluated.text_length or min(WINDOW_TOKENS, context)
    if cfg.text and Path(cfg.text).is_dir():
        if evaluated.text_tokens < window:
            raise UserError(f"text_tokens in evaluate_args is {evaluated.text_tokens}, less than a window of {window} "
                            "tokens: raise it, or lower text_length")
        ShardDataset(cfg.text, "val", window)  # raises UserError without a whole window


def check_suite_files(suite: str, folder: str | None) -> None:
    """Raises UserError if the suite, or a local file of items that it names, is not valid."""
    from evaluation.lm_eval_tasks import local_task, quiet, read_suite  # lm-eval takes seconds to import
    for benchmark in read_suite(suite, folder):
        if benchmark.file and not Path(benchmark.file).is_file():
            raise UserError(f"{benchmark.file}, the items of {benchmark.name}, does not exist: {benchmark.make_file}")
        if benchmark.file:
            with quiet():
                local_task(benchmark)


def submit(cfg: ExperimentConfig, jobs: list[Job], ledger: Ledger) -> None:
    """Submits a Slurm job for each job, after the one that makes its initial checkpoint, then one for the report.

    A Slurm job runs this script again with --only, so that the job is recorded in the ledger.
    """
    unfinished = [str(arm.folder / "m0") for pair in cfg.each_pair for arm in arms(cfg, pair)
                  if arm.model in PAIR and not arm.level_with and not (arm.folder / "m0").exists()]
    if "loss" in cfg.controls and unfinished:
        raise UserError("the loss control trains the model with the higher loss further, and "
                        f"{unfinished[0]} is not finished: submit with --controls flops, and when these jobs have "
                        "ended again with flops,loss")
    template, folder = read_slurm_template(cfg.slurm_file), Path(cfg.out) / "slurm"
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name != "slurm_file"
              and getattr(cfg, field.name) != field.default}
    values["launcher"] = f"bash {shlex.quote(str(ROOT / 'configs/slurm/launch.sh'))}"
    text = "".join(f"{name} = {json.dumps('none' if value is None else value, ensure_ascii=False)}\n"
                   for name, value in values.items())  # TOML
    config = folder / f"settings-{hashlib.sha256(text.encode()).hexdigest()[:12]}.toml"
    write_text(config, text)
    numbers: dict[str, str] = {}  # of the Slurm jobs, by the directory that each makes
    for job in jobs:
        parent = numbers.get(str(job.inputs[0])) if job.inputs else None
        command = [sys.executable, str(ROOT / "experiment.py"), "--config", str(config), "--only", str(job.out)]
        numbers[str(job.out)] = submit_command(command, folder / f"{ledger.name(job)}.sh", template, cfg.gpus,
                                               parent and f"afterok:{parent}")
    submit_command(report_command(cfg), folder / "report.sh", template, 1,  # it needs none, which not all clusters take
                   "afterany:" + ":".join(numbers.values()) if numbers else None)
    print(f"{len(numbers) + 1} jobs submitted; their scripts and logs: {folder}")


def run_unfinished(jobs: list[Job], plan: list[Job], ledger: Ledger, pace: Pace) -> list[str]:
    """Runs those of `jobs` that are missing or changed, in order, and records them. plan: all jobs of the experiment.

    Returns the directories of incomplete evaluations: some benchmark's dataset cannot be downloaded, but later jobs do
    not depend on it. If another job fails, this process exits with its status.
    """
    incomplete, remaining = [], [job for job in plan if not ledger.unchanged(job)]
    for job in jobs:
        if ledger.unchanged(job):  # not known before: the jobs before it may have changed its inputs
            continue
        remaining = [job, *(later for later in remaining if later != job)]
        print(f"[{len(plan) - len(remaining) + 1}/{len(plan)}] {job.out}, about "
              f"{format_duration(pace.seconds(remaining))} left in all\n{shlex.join(job.argv)}", flush=True)
        began, entry = time.time(), ledger_entry(job)
        try:
            run_command(job.argv)
        except SystemExit:
            record = job.out / MISSING
            if job.script != "evaluate.py" or not record.exists() or record.stat().st_mtime < began:
                raise
            incomplete.append(str(job.out))  # the results of all available benchmarks are written
        else:
            pace.add(job, time.time() - began)
            ledger.add(job, entry)
        del remaining[0]
    return incomplete


def all_jobs(cfg: ExperimentConfig) -> list[Job]:
    """The jobs of all pairs, as far as they are known: see pipeline.experiment_jobs.arms."""
    return [job for pair in cfg.each_pair for job in pair_jobs(cfg, pair)]


def main(cfg: ExperimentConfig) -> None:
    """Prints the plan, runs the jobs that are missing or changed, and writes the report."""
    jobs, ledger = all_jobs(cfg), Ledger(cfg.out)
    if cfg.only and cfg.only not in (made := [str(job.out) for job in jobs]):
        raise UserError(f"no job of this experiment makes {cfg.only}, expected a directory such as {made[0]}: "
                        "--dry_run without --only lists them")
    jobs = [job for job in jobs if not cfg.only or str(job.out) == cfg.only]
    pace, to_do = Pace(UTILISATION * machine_speed()), [job for job in jobs if not ledger.unchanged(job)]
    listed = jobs if cfg.only or not cfg.pairs else pair_jobs(cfg, cfg.pairs[0])
    for number, job in enumerate(listed, 1):
        print(f"  {number:>3}  {job.out}: " + (f"{job.flops / 1e12:.2f} TFLOP" if job in to_do else "complete"))
    if len(listed) < len(jobs):
        print(f"       and those of the pairs {', '.join(map(str, cfg.pairs[1:]))}")
    print(f"{len(jobs)} jobs, {len(to_do)} of them to do; about {format_duration(pace.seconds(to_do))} at "
          f"{UTILISATION:.0%} of a matrix product's speed on one device of this machine", flush=True)
    for note in length_notes(cfg):
        print(f"note: {note}", flush=True)
    if cfg.dry_run:
        return
    check_before_running(cfg, to_do)
    record_primary(cfg)
    if cfg.launcher == "slurm":
        return submit(cfg, to_do, ledger)
    if cfg.only:
        return fail_if_incomplete(run_unfinished(jobs, jobs, ledger, pace))
    incomplete: list[str] = []
    for pair in cfg.each_pair:
        if "loss" in cfg.controls:  # which model has to be trained further is known when both m0 are finished
            run_unfinished([m0_job(cfg, arm) for arm in arms(cfg, pair) if not arm.level_with], jobs, ledger, pace)
            jobs = all_jobs(cfg)
        incomplete += run_unfinished(pair_jobs(cfg, pair), jobs, ledger, pace)
    try:
        run_command(report_command(cfg))
    except SystemExit:
        if not incomplete:
            raise
    fail_if_incomplete(incomplete)


def fail_if_incomplete(incomplete: list[str]) -> None:
    """Raises UserError if there are incomplete evaluations, named by their directories."""
    if incomplete:
        raise UserError(f"{len(incomplete)} evaluations are incomplete: {', '.join(incomplete)}. Each said why above; "
                        "run the same command again to repeat them")


if __name__ == "__main__":
    run((ExperimentConfig, main), __doc__)
