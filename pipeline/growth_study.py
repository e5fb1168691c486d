"""Does growing pay? Trains a model from scratch and grown from one base at equal FLOPs, and draws loss over FLOPs.

    python -m pipeline.growth_study --size small --data data/text/small --out runs/small/growth-study
    python -m pipeline.growth_study --size small … --seeds 42,43,44        scratch and stack also for the further seeds

All runs of a seed see the same stream of samples and are evaluated on the same held-out text. FLOPs are 6 N D, and a
grown model's include its base's. What was finished is not done again; the table and the figure are made anew from
the runs' metrics.jsonl each time.
"""
import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.files import UserError, explain_os_errors, write_json, write_text
from common.provenance import data_digest
from common.settings import run, setting, unknown_name
from model import growth
from pipeline.jobs import base_stage, claim, growth_stage, run_stages, shape, train_stage, words

OPERATORS = "stack", "interleave", "middle"

FREE = "data", "out", "launcher", "dry_run", "operators", "seeds"  # what may differ when runs are added to a study

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"scratch": "#000000", "stack": "#D55E00", "interleave": "#0072B2", "middle": "#009E73"}


@dataclass(frozen=True)
class GrowthStudyConfig:
    """Settings of a growth study."""
    size: str | None = setting(None, "size preset (a file in configs/size)")
    data: str | None = setting(None, "directory of token shards")
    out: str | None = setting(None, "folder of the study")
    operators: tuple[str, ...] = setting(OPERATORS, f"growth operators, of {', '.join(OPERATORS)}")
    factor: int = setting(4, "growth factor")
    base_tokens: int | None = setting(None, "tokens that the base is trained on")
    max_flops: float | None = setting(None, "FLOPs of each run, its base's included")
    warmup_steps: int = setting(20, "steps of warm-up of each run")
    eval_steps: int = setting(20, "evaluate every N steps")
    max_eval_samples: int = setting(128, "held-out samples to evaluate on")
    seeds: tuple[int, ...] = setting((42,), "seeds; for all but the first only scratch and stack are trained")
    launcher: str = setting("", "words before train.py, such as 'torchrun --nproc_per_node 8'; none: one process")
    dry_run: bool = setting(False, "print the commands and run none")
    phase: ClassVar = "study"  # the table of the size's file that holds these settings

    def problems(self):
        found = [f"--{name} is missing" for name in ("size", "data", "out", "base_tokens", "max_flops")
                 if not getattr(self, name)]
        found += unknown_name("size", self.size) if self.size else []
        found += [f"unknown operator {name!r}, expected some of {', '.join(OPERATORS)}"
                  for name in self.operators if name not in OPERATORS]
        found += [f"{name} is {', '.join(map(str, values)) or 'empty'}, expected one or more, each once"
                  for name, values in (("operators", self.operators), ("seeds", self.seeds))
                  if not values or len(set(values)) < len(values)]
        found += [f"{name} is {value}, expected {least} or more" for name, least in
                  (("factor", 2), ("base_tokens", 1), ("max_flops", 1), ("warmup_steps", 0), ("eval_steps", 1),
                   ("max_eval_samples", 1)) if (value := getattr(self, name)) is not None and not value >= least]
        return found + [f"seeds has {seed}, expected numbers of 0 or more" for seed in self.seeds if seed < 0]


def plan(cfg):
    """The stages of the study, in order."""
    config, launcher = shape(cfg.size), words(cfg.launcher)
    base_depth, rest = divmod(config.num_hidden_layers, cfg.factor)
    if rest:
        raise UserError(f"{config.num_hidden_layers} layers are no multiple of the factor {cfg.factor}: choose another")
    before = shape(cfg.size, base_depth).flops(cfg.base_tokens)
    if not before < cfg.max_flops < math.inf:
        raise UserError(f"the base alone costs {before:.3g} FLOPs, and max_flops is {cfg.max_flops:.3g}: raise it, or "
                        "lower base_tokens")
    maps = [growth.OPERATORS[name](base_depth, config.num_hidden_layers) for name in cfg.operators]
    for index, name in enumerate(cfg.operators):
        if maps[index] in maps[:index]:
            raise UserError(f"{name} repeats {base_depth} layers as {cfg.operators[maps.index(maps[index])]} does: leave "
                            "it out of operators")
    stages = []
    for seed in cfg.seeds:
        folder = Path(cfg.out) / f"seed-{seed}"
        flags = ["--seed", seed, "--warmup_steps", cfg.warmup_steps, "--eval_steps", cfg.eval_steps,
                 "--max_eval_samples", cfg.max_eval_samples]
        whole = [*flags, "--max_tokens", "none", "--max_flops", cfg.max_flops]
        stages.append(base_stage(cfg.size, cfg.data, folder / "base", base_depth, cfg.base_tokens, launcher, flags))
        for name in cfg.operators if seed == cfg.seeds[0] else {"stack"} & set(cfg.operators):
            grown = folder / f"grown-{name}"
            stages.append(growth_stage(folder / "base", grown, name, base_depth, config.num_hidden_layers))
            stages.append(train_stage(cfg.size, cfg.data, folder / name, cfg.max_flops - before, launcher,
                                      ["--phase", "stack", "--init", grown, *whole]))
        stages.append(train_stage(cfg.size, cfg.data, folder / "scratch", cfg.max_flops, launcher,
                                  ["--phase", "llm", *whole]))
    return stages


def curve(directory):
    """The held-out loss of a run over the FLOPs spent, its base's included: a list of (FLOPs, nats a token)."""
    with open(Path(directory) / "metrics.jsonl", encoding="utf-8") as lines:
        steps = [json.loads(line) for line in lines]
    return [(step["flops"], step["eval_loss"]) for step in steps if "eval_loss" in step]


def crossing(points, loss):
    """The FLOPs at which a curve first comes down to a loss, between its points along straight lines; None: never."""
    if points[0][1] <= loss:
        return points[0][0]
    for (start, above), (stop, below) in zip(points, points[1:]):
        if below <= loss < above:
            return start + (stop - start) * (above - loss) / (above - below)
    return None


def summary(runs):
    """The table's rows. runs: {seed: {name: curve}}, each seed with a "scratch".

    A row is {name, seeds, after_growth, final, to_scratch, speed_up}, lists over the seeds: losses in nats a token,
    and FLOPs. The speed-up is C_scratch / C - 1 (Du et al., arXiv 2405.15319, section 3), None for a run that does not
    reach scratch's last loss.
    """
    rows = []
    for name in next(iter(runs.values())):
        curves = {seed: found[name] for seed, found in runs.items() if name in found}
        spent = [crossing(points, runs[seed]["scratch"][-1][1]) for seed, points in curves.items()]
        total = [runs[seed]["scratch"][-1][0] for seed in curves]
        rows.append({"name": name, "seeds": list(curves), "final": [points[-1][1] for points in curves.values()],
                     "after_growth": [points[0][1] for points in curves.values()], "to_scratch": spent,
                     "speed_up": [None if flops is None else whole / flops - 1
                                  for flops, whole in zip(spent, total)]})
    return rows


def show(values, form):
    """Values over the seeds as text: one alone, of several the mean and the standard deviation."""
    if None in values:
        return "not reached" if len(values) == 1 else f"not reached in {values.count(None)} of {len(values)}"
    spread = f" ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def study_table(rows):
    """The rows as a Markdown table."""
    lines = ["| model | seeds | loss after growth | final loss | PFLOP to scratch's final loss | speed-up |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        grown = row["name"] not in ("scratch", "base")
        reached = row["name"] != "base"
        spent = [flops and flops / 1e15 for flops in row["to_scratch"]]
        lines.append(f"| {row['name']} | {len(row['seeds'])} | {show(row['after_growth'], '{:.3f}') if grown else '–'} "
                     f"| {show(row['final'], '{:.3f}')} | {show(spent, '{:.4f}') if reached else '–'} "
                     f"| {show(row['speed_up'], '{:+.0%}') if grown else '–'} |")
    return "\n".join(lines) + "\n"


def draw(runs, path, title):
    """Loss over FLOPs of all runs, as PNG and SVG beside each other; `path` without the ending."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    first = next(iter(runs))
    for seed, curves in runs.items():
        for name, points in curves.items():
            x, y = zip(*((flops / 1e15, loss) for flops, loss in points))
            style = {"color": COLOURS.get(name, "#777777"), "lw": 1.8 if seed == first else 0.8}
            label = f"{name}: {y[-1]:.3f}" if seed == first else None
            if name == "base":
                axes.plot(x, y, "--", label=label, **style)
            else:
                axes.plot(x, y, "-o", ms=3 if seed == first else 0, label=label, **style)
    goal = runs[first]["scratch"][-1][1]
    axes.axhline(goal, color="#000000", lw=0.8, ls=":")
    for name, points in runs[first].items():
        if name not in ("base", "scratch") and (flops := crossing(points, goal)) is not None:
            axes.plot(flops / 1e15, goal, "D", ms=7, color=COLOURS[name], mec="white")
    total = runs[first]["scratch"][-1][0]
    shown = [loss for curves in runs.values() for points in curves.values() for flops, loss in points
             if flops > 0.1 * total]
    margin = 0.05 * (max(shown) - min(shown))
    axes.set(xlim=(0, total * 1.01 / 1e15), ylim=(min(shown) - margin, max(shown) + margin), title=title,
             xlabel="training compute, base included (PFLOP, 6ND)", ylabel="held-out loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(title="final loss (diamond: scratch's is reached)", frameon=False)
    for ending in ("png", "svg"):
        with explain_os_errors(path):
            figure.savefig(Path(f"{path}.{ending}"), dpi=110)
    pyplot.close(figure)


def main(cfg):
    """Runs what is missing of the study, then writes the study_table and the figure."""
    stages = plan(cfg)
    fixed = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE}
    if not cfg.dry_run:
        claim(Path(cfg.out) / "study.json", stages, **fixed, data_digest=data_digest(cfg.data))
    run_stages([stage for stage in stages if not stage.out.exists()], cfg.dry_run)
    if cfg.dry_run:
        return
    runs = {}
    for stage in stages:
        if not stage.out.name.startswith("grown-"):
            runs.setdefault(int(stage.out.parent.name.removeprefix("seed-")), {})[stage.out.name] = curve(stage.out)
    rows = summary(runs)
    out = Path(cfg.out) / "growth-study"
    write_json(out.with_suffix(".json"), rows)
    write_text(out.with_suffix(".md"), study_table(rows))
    config = shape(cfg.size)
    depth = config.num_hidden_layers
    draw(runs, out, f"{config.num_parameters / 1e6:.1f}M parameters: {depth} layers from scratch, and grown from "
                    f"{depth // cfg.factor}")
    print(study_table(rows) + f"figure: {out}.png")


if __name__ == "__main__":
    run((GrowthStudyConfig, main), __doc__)
