"""Builds m0, the checkpoint that fine-tuning starts from, by the recipe of a size (configs/size).

    python pretrain.py --size tiny --model stack --data data/text/tiny --out runs/tiny/stack
    python pretrain.py --size tiny --model llm   --data data/text/tiny --out runs/tiny/llm
    python pretrain.py --size tiny --model llm … --out runs/tiny/llm-level --init runs/tiny/llm/m0 \\
        --level_with runs/tiny/stack/m0                                             until its held-out loss is as low
    python pretrain.py --size 7b --model stack … --launcher "torchrun --nproc_per_node 8" --dry_run

"llm" is one run of train.py from new weights, and so is "base", the shallow base trained further to the FLOPs of "llm".
A model named after a growth operator, such as "stack", is a base, its growth by stack.py, and a run that continues in
the text where the base stopped, with a new optimizer and schedule. Gradual growth is a longer schedule: with
`factors = [2, 2]` and `at_tokens = [400_000, 900_000]` the base is grown after 400,000 tokens and again after 900,000.
Each job is a separate command, which is printed. Finished jobs are not repeated.
"""
import common.preamble

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.configs import CONFIGS, known
from common.files import UserError
from common.provenance import data_digest, read_record
from common.scripts import run
from common.settings import load, setting
from model.config import size_config
from pipeline.chain import MODELS
from pipeline.jobs import Job, further_flags, run_jobs, split_words
from pipeline.pretraining import (
    FACTORS,
    base_depth,
    base_job,
    growth_job,
    held_out_loss,
    layer_maps,
    record_recipe,
    run_flops,
    training_job,
)
from training.train_config import TrainConfig

RUN_SETTINGS = {"task", "size", "phase", "init", "data", "out", "seed", "local_rank"}  # what identifies the last run
LEVEL_EVAL_STEPS = 10  # a run that continues to train m0 ends at an evaluation


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of pretraining: the recipe, and the schedule of growth in it."""
    size: str = setting(None, "size preset (a file in configs/size)", required=True, names="size", overlay=True)
    model: str = setting("stack", "llm: full size from the start; base: the shallow base trained further; or the "
                                  "growth operator of a model grown from a base", names=MODELS)
    data: str = setting(None, "directory of token shards", required=True)
    out: str = setting(None, "folder of the runs; the last one is m0 in it", required=True)
    init: str | None = setting(None, "finished m0 of this model, to train further until its held-out loss is that of "
                                     "--level_with")
    level_with: str | None = setting(None, "m0 whose held-out loss --init has to reach")
    factors: tuple[int, ...] = setting(FACTORS, "growth factors, one for each growth", at_least=2,
                                       used_if=("model", [name for name in MODELS if name != "llm"]))
    at_tokens: tuple[int, ...] = setting((), "tokens seen at each growth", at_least=1, at_most=10 ** 18,
                                         used_if=("model", [name for name in MODELS if name not in ("llm", "base")]))
    seed: int = setting(42, "seed of all runs: of new weights and of the sample order", at_least=0)
    launcher: str = setting("", "words before train.py, such as 'torchrun --nproc_per_node 8'; not given: one process")
    args: str = setting("", "flags for the last run of train.py, such as '--learning_rate 1e-4'")
    dry_run: bool = setting(False, "print the commands and run none")
    phase: ClassVar[str] = "growth"  # the table of the size's file that holds these settings

    @property
    def phase_of_m0(self) -> str:
        """The table of the size's file with the recipe of the run that ends in m0."""
        return self.model if self.model in ("llm", "base") else "stack"

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = []
        if (self.init is None) != (self.level_with is None):
            found.append("init and level_with must be given together")
        if self.phase_of_m0 == "stack" and len(self.at_tokens) != len(self.factors):
            found.append(f"{len(self.factors)} factors and {len(self.at_tokens)} at_tokens, expected one of each per "
                         "growth")
        if any(later <= earlier for earlier, later in zip(self.at_tokens, self.at_tokens[1:])):
            found.append(f"at_tokens is {', '.join(map(str, self.at_tokens))}, expected increasing numbers")
        if self.phase_of_m0 == "stack" and self.model in MODELS and self.size in known("size") and not self.init:
            try:
                layer_maps(self.size, self.model, self.factors)
            except UserError as error:
                found.append(str(error))
        if self.size in known("size"):
            init = ["--init", "x"] if self.phase_of_m0 == "stack" else []
            try:
                load(TrainConfig, ["--config", str(CONFIGS / "train/pretrain.toml"), "--size", self.size, "--phase",
                                   self.phase_of_m0, "--data", "x", "--out", "x", *init,
                                   *further_flags(self.args, RUN_SETTINGS)])
            except UserError as error:
                found.append(f"args: {error}")
        return found


def pretraining_jobs(cfg: PretrainConfig) -> list[Job]:
    """The jobs that make m0, in order."""
    out, seed, args = Path(cfg.out), ["--seed", cfg.seed], split_words(cfg.args)
    if cfg.init:
        return [level_job(cfg, [*seed, *args])]
    if cfg.model == "llm":
        return [training_job(cfg, out / "m0", run_flops(cfg.size, "llm"), ["--phase", "llm", *seed, *args])]
    depth = base_depth(cfg.size, cfg.factors)
    if cfg.model == "base":
        flops = run_flops(cfg.size, "llm")
        return [training_job(cfg, out / "m0", flops, ["--phase", "base", "--num_hidden_layers", depth, "--max_flops",
                                                      flops, *seed, *args])]
    jobs = [base_job(cfg, out / "base", depth, cfg.at_tokens[0], seed)]
    for index, factor in enumerate(cfg.factors):
        grown = out / f"grown-{depth * factor}"
        jobs.append(growth_job(jobs[-1].out, grown, cfg.model, depth, depth * factor))
        depth *= factor
        flags = ["--phase", "stack", "--init", grown, *seed]
        if index + 1 < len(cfg.factors):
            tokens = cfg.at_tokens[index + 1] - cfg.at_tokens[index]
            jobs.append(training_job(cfg, out / f"trained-{depth}", size_config(cfg.size, depth).flops(tokens),
                                     [*flags, "--max_tokens", tokens, "--max_flops", "none"]))
    flops = run_flops(cfg.size, "stack", spent=sum(job.flops for job in jobs))
    return [*jobs, training_job(cfg, out / "m0", flops, [*flags, *args])]


def level_job(cfg: PretrainConfig, flags: Sequence[object]) -> Job:
    """A run that continues to train m0, at the rate with which its schedule ended, until its held-out loss is that of
    another m0, for at most as many FLOPs again."""
    assert cfg.init  # see problems()
    assert cfg.level_with
    held_out_loss(cfg.init)  # it has to be a finished run of train.py
    record = read_record(cfg.init)
    used, flops = record["settings"], record["lineage"]["flops"]
    if cfg.seed != used["seed"]:
        raise UserError(f"{cfg.init} was trained with the seed {used['seed']}, whose order of samples is continued: "
                        f"give --seed {used['seed']}")
    rate = used["learning_rate"] * (1 if used["lr_scheduler_type"] == "constant" else used["min_lr_ratio"])
    if not rate:
        raise UserError(f"{cfg.init} was trained with min_lr_ratio 0, so that its learning rate ended at 0 "
                        "and it cannot be trained further: pretrain it with a min_lr_ratio above 0")
    return training_job(cfg, Path(cfg.out) / "m0", flops, [
        "--phase", cfg.phase_of_m0, "--init", cfg.init, "--max_tokens", "none", "--max_flops", 2 * flops,
        "--lr_scheduler_type", "constant", "--learning_rate", rate,
        "--eval_steps", LEVEL_EVAL_STEPS, "--stop_at_eval_loss", held_out_loss(cfg.level_with), *flags])


def main(cfg: PretrainConfig) -> None:
    """Runs the missing jobs. The last job always runs: train.py notices that it is finished."""
    jobs = pretraining_jobs(cfg)
    if not cfg.dry_run:
        growth = {"factors": cfg.factors} if cfg.model != "llm" else {}
        growth |= {"at_tokens": cfg.at_tokens} if cfg.phase_of_m0 == "stack" else {}
        phases = {"llm": ["llm"], "base": ["base", "llm"]}.get(cfg.model, ["base", "stack"])  # a base has llm's FLOPs
        record_recipe(Path(cfg.out) / "recipe.json", [job.out for job in jobs], phases, size=cfg.size,
                      trained=cfg.model, seed=cfg.seed, data_digest=data_digest(cfg.data), **growth)
    last_made = max((index for index, job in enumerate(jobs) if job.out.exists()), default=-1)
    run_jobs(jobs[last_made + 1:] or jobs[-1:], cfg.dry_run)


if __name__ == "__main__":
    run((PretrainConfig, main), __doc__)
