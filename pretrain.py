"""Builds m0, the model that fine-tuning starts from, by the recipe of a size (configs/size).

    python pretrain.py --size tiny --model stack --data data/text/tiny --out runs/tiny/stack
    python pretrain.py --size tiny --model llm   --data data/text/tiny --out runs/tiny/llm
    python pretrain.py --size 7b --model stack … --launcher "torchrun --nproc_per_node 8" --dry_run

"llm" is one run of train.py. "stack" is a base, a growth by stack.py, and a run that goes on in the text where the base
stopped, with the optimizer and the schedule anew. Gradual growth is a longer schedule: with `factors = [2, 2]` and
`at_tokens = [400_000, 900_000]` the base is grown after 400,000 tokens and again after 900,000. Each stage is a command
of its own, which is printed, and what is there already is not made again.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from common.files import UserError
from common.provenance import data_digest
from common.settings import read_config, run, setting, unknown_name
from pipeline.jobs import base_stage, claim, growth_stage, run_stages, shape, train_stage, words


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of pretraining: which recipe, and the schedule of growth in it."""
    size: str | None = setting(None, "size preset (a file in configs/size)")
    model: Literal["stack", "llm"] = setting("stack", "stack: grown from a base; llm: full size from the start")
    data: str | None = setting(None, "directory of token shards")
    out: str | None = setting(None, "folder of the stages; the last one is m0 in it")
    operator: Literal["stack", "interleave", "middle"] = setting("stack", "growth operator of stack.py")
    factors: tuple[int, ...] = setting((4,), "growth factors, one a growth")
    at_tokens: tuple[int, ...] | None = setting(None, "tokens seen when each growth comes")
    seed: int = setting(42, "seed of all runs: of new weights and of the order of the samples")
    launcher: str = setting("", "words before train.py, such as 'torchrun --nproc_per_node 8'; none: one process")
    args: str = setting("", "flags for the last run of train.py, such as '--learning_rate 1e-4'")
    dry_run: bool = setting(False, "print the commands and run none")
    phase: ClassVar = "growth"  # the table of the size's file that holds these settings

    def problems(self):
        found = [f"--{name} is missing" for name in ("size", "data", "out") if not getattr(self, name)]
        found += unknown_name("size", self.size) if self.size else []
        if wrong := [factor for factor in self.factors if factor < 2]:
            found.append(f"factors has {', '.join(map(str, wrong))}, expected numbers of 2 or more")
        times = self.at_tokens or ()
        if self.model == "stack" and len(times) != len(self.factors):
            found.append(f"{len(self.factors)} factors and {len(times)} at_tokens, expected one of each a growth")
        if any(later <= earlier for earlier, later in zip((0, *times), times)):
            found.append(f"at_tokens is {', '.join(map(str, times))}, expected rising numbers above 0")
        return found + ([f"seed is {self.seed}, expected 0 or more"] if self.seed < 0 else [])


def recipe(cfg):
    """The stages to m0, in order."""
    out, launcher, seed, last = Path(cfg.out), words(cfg.launcher), ["--seed", cfg.seed], words(cfg.args)
    config, tables = shape(cfg.size), read_config("size", cfg.size)
    if cfg.model == "llm":
        return [train_stage(cfg.size, cfg.data, out / "m0", work(tables, "llm", config), launcher,
                            ["--phase", "llm", *seed, *last])]
    depth, rest = divmod(config.num_hidden_layers, math.prod(cfg.factors))
    if rest:
        raise UserError(f"{config.num_hidden_layers} layers are no multiple of the growth factors "
                        f"{' × '.join(map(str, cfg.factors))}: choose others")
    stages = [base_stage(cfg.size, cfg.data, out / "base", depth, cfg.at_tokens[0], launcher, seed)]
    for index, factor in enumerate(cfg.factors):
        grown = out / f"grown-{depth * factor}"
        stages.append(growth_stage(stages[-1].out, grown, cfg.operator, depth, depth * factor))
        depth *= factor
        flags = ["--phase", "stack", "--init", grown, *seed]
        if index + 1 < len(cfg.factors):
            tokens = cfg.at_tokens[index + 1] - cfg.at_tokens[index]
            stages.append(train_stage(cfg.size, cfg.data, out / f"trained-{depth}", shape(cfg.size, depth).flops(tokens),
                                      launcher, [*flags, "--max_tokens", tokens, "--max_flops", "none"]))
    flops = work(tables, "stack", config, spent=sum(stage.flops for stage in stages))
    return [*stages, train_stage(cfg.size, cfg.data, out / "m0", flops, launcher, [*flags, *last])]


def work(tables, phase, config, spent=0.0):
    """The FLOPs of the run that a phase's table asks for, where `spent` were spent on its checkpoint before."""
    table = tables.get(phase, {})
    if not table.keys() & {"max_flops", "max_tokens"}:
        raise UserError(f"the table [{phase}] of the size says neither max_flops nor max_tokens: add one")
    flops = table["max_flops"] - spent if "max_flops" in table else config.flops(table["max_tokens"])
    if flops <= 0:
        raise UserError(f"the stages before m0 cost {spent:.4g} FLOPs, and max_flops in [{phase}] is "
                        f"{table['max_flops']:.4g}: grow earlier, or raise it")
    return flops


def main(cfg):
    """Runs what is missing. The last stage is always handed to train.py, which sees whether it is finished."""
    stages = recipe(cfg)
    if not cfg.dry_run:
        claim(Path(cfg.out) / "recipe.json", stages, size=cfg.size, operator=cfg.operator, factors=cfg.factors,
              at_tokens=cfg.at_tokens, seed=cfg.seed, data_digest=data_digest(cfg.data))
    made = max((index for index, stage in enumerate(stages) if stage.out.exists()), default=-1)
    run_stages(stages[made + 1:] or stages[-1:], cfg.dry_run)


if __name__ == "__main__":
    run((PretrainConfig, main), __doc__)
