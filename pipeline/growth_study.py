"""Trains a model grown from a base and its two controls at equal FLOPs, and plots loss over FLOPs: does growing pay?

    python -m pipeline.growth_study --size small --data data/text/small --out runs/small/growth-study
    python -m pipeline.growth_study --size small … --seeds 42,43,44        stack and the controls for all seeds

The controls are the full depth trained from scratch, and the shallow base trained further, to the same FLOPs.
Growing pays only if the grown model beats both. If the base trained further is best, the budget is too small for the
depth. This base is a separate run: the schedule of the base that is grown ends at the growth.

MIDAS and LIDAS grow in stages: from one block of layers to the full depth, one block more at a time. Stage i of k has a
share of the steps in proportion to i^α (PROP-α of arXiv 2409.19044), and one schedule of the learning rate spans all
stages. `moments` says what the optimizer's moments are after growth.

All runs of a seed see the same stream of samples and are evaluated on the same held-out text. FLOPs are 6 N D, and a
grown model's include its base's. Finished runs are not repeated; the table and the figure are made again from the
runs' metrics.jsonl each time.
"""
import common.preamble

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from analysis.loss_curves import Curve
from common.configs import CONFIGS
from common.files import UserError
from common.provenance import data_digest
from common.scripts import run
from common.settings import load, setting
from common.writing import write_json, write_text
from model.config import size_config
from model.growth import OPERATORS, ZERO_OPERATORS
from pipeline.growth_report import TRAINED_ON, conclusion, plot_study, read_curve, study_table, summarize_runs
from pipeline.jobs import Job, run_jobs
from pipeline.pretraining import (
    DEPTH_OPERATORS,
    STAGED_OPERATORS,
    base_depth,
    base_job,
    growth_job,
    record_recipe,
    training_job,
)
from training.train_config import TrainConfig

# What may change when runs are added to a study.
MAY_CHANGE = "data", "out", "launcher", "dry_run", "operators", "staged", "moments", "repeated", "seeds"
OF_STAGES = "stages", "alpha"  # of growth in stages alone


@dataclass(frozen=True)
class GrowthStudyConfig:
    """Settings of a growth study."""
    size: str = setting(None, "size preset (a file in configs/size)", required=True, names="size", overlay=True)
    data: str = setting(None, "directory of token shards", required=True)
    out: str = setting(None, "folder of the study", required=True)
    operators: tuple[str, ...] = setting(("stack", "interleave", "middle"), "growth operators, of "
                                         + ", ".join(DEPTH_OPERATORS), required=True, names=DEPTH_OPERATORS)
    factor: int = setting(4, "growth factor", at_least=2)
    base_tokens: int = setting(None, "tokens that the base is trained on", required=True, at_least=1,
                               at_most=10 ** 18)
    staged: tuple[str, ...] = setting((), "also growth in stages, of " + ", ".join(STAGED_OPERATORS),
                                      names=STAGED_OPERATORS)
    stages: int = setting(4, "growth in stages: number of stages", at_least=2)
    alpha: float = setting(1.0, "growth in stages: the steps of stage i are in proportion to i^alpha", at_least=0,
                           at_most=10)
    moments: tuple[str, ...] = setting(("reset",), "growth in stages: optimizer moments: reset, copied from the copied "
                                                   "layers, or zero in the new layers",
                                       names=("reset", "copied", "zero"))
    repeated: tuple[str, ...] = setting(("stack",), "of the grown models, those that all seeds train")
    max_flops: float = setting(None, "FLOPs of each run, including its base's", required=True, at_least=1,
                               at_most=1e30)
    warmup_steps: int = setting(20, "steps of warm-up of each run", at_least=0)
    eval_steps: int = setting(20, "evaluate every N steps", at_least=1)
    max_eval_samples: int = setting(128, "held-out samples to evaluate on", at_least=1)
    seeds: tuple[int, ...] = setting((42,), "seeds; those after the first train only `repeated` and the controls",
                                     required=True, at_least=0)
    launcher: str = setting("", "words before train.py, such as 'torchrun --nproc_per_node 8'; not given: one process")
    dry_run: bool = setting(False, "print the commands and run none")
    phase: ClassVar[str] = "study"  # the table of the size's file that holds these settings

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = [f"{name} is {', '.join(map(str, values))}, expected each once"
                 for name in ("operators", "seeds", "staged", "moments")
                 if len(set(values := getattr(self, name))) < len(values)]
        grown = [*self.operators, *staged_names(self)]
        if unknown := [name for name in self.repeated if name not in grown and name != "stack"]:
            found.append(f"repeated names {', '.join(unknown)}, expected some of {', '.join(grown)}")
        return found


def study_jobs(cfg: GrowthStudyConfig) -> list[Job]:
    """The jobs of the study, in order."""
    depth, shallow = size_config(cfg.size).num_hidden_layers, base_depth(cfg.size, [cfg.factor])
    base_flops = size_config(cfg.size, shallow).flops(cfg.base_tokens)
    if base_flops >= cfg.max_flops:
        raise UserError(f"the base alone costs {base_flops:.3g} FLOPs, and max_flops is {cfg.max_flops:.3g}: raise it, "
                        "or lower base_tokens")
    grown_by: dict[tuple[bool, tuple[int, ...]], str] = {}
    for name in cfg.operators:
        result = name in ZERO_OPERATORS, tuple(OPERATORS[name](shallow, depth))
        if (same := grown_by.setdefault(result, name)) != name:
            raise UserError(f"{name} repeats {shallow} layers as {same} does: remove it from operators")
    jobs = []
    for seed in cfg.seeds:
        folder = Path(cfg.out) / f"seed-{seed}"
        flags = ["--seed", seed, "--warmup_steps", cfg.warmup_steps, "--eval_steps", cfg.eval_steps,
                 "--max_eval_samples", cfg.max_eval_samples]
        whole = [*flags, "--max_tokens", "none", "--max_flops", cfg.max_flops]
        jobs.append(base_job(cfg, folder / "base", shallow, cfg.base_tokens, flags))
        first = seed == cfg.seeds[0]
        for name in cfg.operators:
            if not (first or name in cfg.repeated):
                continue
            grown = folder / f"grown-{name}"
            jobs.append(growth_job(folder / "base", grown, name, shallow, depth))
            jobs.append(training_job(cfg, folder / name, cfg.max_flops - base_flops,
                                     ["--phase", "stack", "--init", grown, *whole]))
        for name in staged_names(cfg):
            if first or name in cfg.repeated:
                jobs += staged_jobs(cfg, folder / name, flags)
        jobs.append(training_job(cfg, folder / "scratch", cfg.max_flops, ["--phase", "llm", *whole]))
        jobs.append(training_job(cfg, folder / TRAINED_ON, cfg.max_flops, [
            "--phase", "base", "--num_hidden_layers", shallow, *whole]))
    return jobs


def staged_names(cfg: GrowthStudyConfig) -> list[str]:
    """The names of the models that are grown in stages: operator and policy for the moments."""
    return [f"{operator}-{policy}" for operator in cfg.staged for policy in cfg.moments]


def staged_jobs(cfg: GrowthStudyConfig, folder: Path, flags: Sequence[object]) -> list[Job]:
    """The jobs of a growth in stages: training and growth in turn, with the FLOPs of the other models in all."""
    operator, policy = folder.name.split("-")
    full = size_config(cfg.size).num_hidden_layers
    block, rest = divmod(full, cfg.stages)
    if rest:
        raise UserError(f"{cfg.stages} stages of one block each do not reach {full} layers: choose a divisor of {full} "
                        "as stages")
    depths = [block * stage for stage in range(1, cfg.stages + 1)]
    recipe = load(TrainConfig, ["--config", str(CONFIGS / "train/pretrain.toml"), "--size", cfg.size, "--phase", "llm",
                                "--data", cfg.data, "--out", cfg.out])
    step_flops = [size_config(cfg.size, depth).flops(recipe.global_batch_size * recipe.seq_length) for depth in depths]
    shares = [stage ** cfg.alpha for stage in range(1, cfg.stages + 1)]
    total = cfg.max_flops / sum(share * flops for share, flops in zip(shares, step_flops))
    ends = [0, *(round(total * sum(shares[:stage])) for stage in range(1, cfg.stages + 1))]
    if short := [stage for stage in range(1, cfg.stages + 1) if ends[stage] == ends[stage - 1]]:
        raise UserError(f"stage {short[0]} of {folder.name} would have no step: raise max_flops, or lower alpha or "
                        "stages")
    carry, jobs = ["--carry_moments"] if policy != "reset" else [], list[Job]()
    for stage, depth in enumerate(depths, 1):
        steps, init = ends[stage] - ends[stage - 1], ["--num_hidden_layers", depth]
        if stage > 1:
            grown = folder / f"grown-{depth}"
            jobs.append(growth_job(jobs[-1].out, grown, operator, depth - block, depth, policy))
            init = ["--init", grown]
        length = ["--max_flops", "none", "--max_tokens", "none", "--max_steps", steps]
        schedule = ["--schedule_start", ends[stage - 1], "--schedule_steps", ends[-1]]
        jobs.append(training_job(cfg, folder / f"stage-{stage}", steps * step_flops[stage - 1],
                                 ["--phase", "llm", *init, *flags, *carry, *length, *schedule]))
    return jobs


def record_recipes(cfg: GrowthStudyConfig, jobs: Sequence[Job]) -> None:
    """Records what the runs of the study are made with, and of each growth in stages its stages. Raises UserError if
    finished runs were made with other settings."""
    fixed = {name: value for name, value in dataclasses.asdict(cfg).items()
             if name not in (*MAY_CHANGE, *OF_STAGES)} | {"data_digest": data_digest(cfg.data)}
    names = {Path(*job.out.relative_to(cfg.out).parts[1:]) for job in jobs}
    made = [folder / name for folder in Path(cfg.out).glob("seed-*") for name in names]  # with any seed
    record_recipe(Path(cfg.out) / "study.json", made, **fixed)
    for folder in dict.fromkeys(job.out.parent for job in jobs if job.out.parent.name in staged_names(cfg)):
        record_recipe(folder / "recipe.json", [job.out for job in jobs if job.out.parent == folder], **fixed,
                      **{name: getattr(cfg, name) for name in OF_STAGES})


def main(cfg: GrowthStudyConfig) -> None:
    """Runs the missing jobs of the study, then writes the table and the figure."""
    jobs = study_jobs(cfg)
    if not cfg.dry_run:
        record_recipes(cfg, jobs)
    run_jobs([job for job in jobs if not job.out.exists()], cfg.dry_run)
    if cfg.dry_run:
        return
    runs: dict[int, dict[str, Curve]] = {seed: {} for seed in cfg.seeds}
    for job in jobs:
        seed, name = job.out.relative_to(cfg.out).parts[:2]
        if not job.out.name.startswith("grown-"):  # the stages of one growth make one curve
            runs[int(seed.removeprefix("seed-"))].setdefault(name, []).extend(read_curve(job.out / "metrics.jsonl"))
    rows, config, out = summarize_runs(runs), size_config(cfg.size), Path(cfg.out) / "growth-study"
    depth = config.num_hidden_layers
    write_json(out.with_suffix(".json"), rows)
    result = f"{study_table(rows)}\n{conclusion(rows)}"
    write_text(out.with_suffix(".md"), result)
    plot_study(out, runs, f"{config.num_parameters / 1e6:.1f}M parameters: {depth} layers from scratch and grown, and "
                          f"the base of {depth // cfg.factor} layers, trained further")
    print(f"{result}figure: {out}.png")


if __name__ == "__main__":
    run((GrowthStudyConfig, main), __doc__)
