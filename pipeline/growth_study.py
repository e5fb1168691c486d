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
import common.interrupts

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.lines import Line2D

from analysis.figures import PALETTE, add_legend, make_panels, save_figure, styled
from analysis.inference import PairedDifference
from analysis.loss_curves import Curve, curve_of_log, draw_loss_curves, flops_to_loss, mean_curve
from common.configs import CONFIGS
from common.files import UserError
from common.formatting import markdown_table
from common.metrics_log import read_log
from common.provenance import data_digest
from common.scripts import run
from common.settings import load, setting
from common.writing import write_json, write_text
from model.config import size_config
from model.growth import OPERATORS, ZERO_OPERATORS
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
TRAINED_ON = "base-trained-on"  # the control: its folder, and its name in growth-study.json
LABELS = {TRAINED_ON: "base, trained further"}  # in the table and the figure
MIN_SEEDS = 3  # that a verdict on depth and growing takes
# As in the report's figures (MODELS in analysis/figures.py), where scratch is llm.
COLOURS = dict(zip(dict.fromkeys(["scratch", "stack", "base", "interleave", *DEPTH_OPERATORS]), [*PALETTE, "#777777"]))
COLOURS[TRAINED_ON] = COLOURS["base"]


@dataclass(frozen=True)
class GrowthStudyConfig:
    """Settings of a growth study."""
    size: str = setting(None, "size preset (a file in configs/size)", required=True, names="size")
    data: str = setting(None, "directory of token shards", required=True)
    out: str = setting(None, "folder of the study", required=True)
    operators: tuple[str, ...] = setting(("stack", "interleave", "middle"), "growth operators, of "
                                         + ", ".join(DEPTH_OPERATORS), required=True, names=DEPTH_OPERATORS)
    factor: int = setting(4, "growth factor", at_least=2)
    base_tokens: int = setting(None, "tokens that the base is trained on", required=True, at_least=1,
                               at_most=10 ** 18)
    staged: tuple[str, ...] = setting((), "also growth in stages, of " + ", ".join(STAGED_OPERATORS),
                                      names=STAGED_OPERATORS)
    stages: int = setting(4, "stages of such a growth", at_least=2)
    alpha: float = setting(1.0, "the steps of stage i of such a growth are in proportion to i^alpha", at_least=0,
                           at_most=10)
    moments: tuple[str, ...] = setting(("reset",), "optimizer moments at such a growth: reset, copied from the copied "
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


def read_curve(path: Path) -> Curve:
    """The evaluations in a run's metrics.jsonl. Raises UserError if there are none."""
    if not (curve := curve_of_log(read_log(path))):
        raise UserError(f"{path} has no evaluations: remove {path.parent}, and the run is repeated")
    return curve


def summarize_runs(runs: Mapping[int, Mapping[str, Curve]]) -> list[dict]:
    """The rows of the table. runs: {seed: {name: curve}}, each seed with a "scratch".

    A row is {name, seeds, after_growth, final, difference, to_scratch, speed_up}, each a list over the seeds: losses in
    nats per token, and FLOPs. The difference is that of the final loss to scratch's. The speed-up is C_scratch / C - 1
    (Du et al., arXiv 2405.15319, section 3), None for a run that does not reach the final loss of scratch, or has it
    before any training.
    """
    rows = []
    for name in next(iter(runs.values())):
        curves = {seed: by_name[name] for seed, by_name in runs.items() if name in by_name}
        ends = [runs[seed]["scratch"][-1] for seed in curves]
        reached = [flops_to_loss(curve, loss) for curve, (_, loss) in zip(curves.values(), ends)]
        rows.append({"name": name, "seeds": list(curves), "final": [curve[-1][1] for curve in curves.values()],
                     "difference": [curve[-1][1] - loss for curve, (_, loss) in zip(curves.values(), ends)],
                     "after_growth": [curve[0][1] for curve in curves.values()], "to_scratch": reached,
                     "speed_up": [total / flops - 1 if flops else None for flops, (total, _) in zip(reached, ends)]})
    return rows


def format_over_seeds(values: Sequence[float | None], form: str) -> str:
    """Values over the seeds as text: a single one, or mean and standard deviation."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "not reached" if len(values) == 1 else f"not reached in {len(values) - len(numbers)} of {len(values)}"
    spread = f" ± {form.format(statistics.stdev(numbers)).lstrip('+')}" if len(numbers) > 1 else ""
    return form.format(statistics.mean(numbers)) + spread


def study_table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        name = row["name"]
        petaflops = [flops and flops / 1e15 for flops in row["to_scratch"]]
        lines.append([LABELS.get(name, name), len(row["seeds"]),
                      format_over_seeds(row["after_growth"], "{:.3f}") if name in OPERATORS else "–",
                      format_over_seeds(row["final"], "{:.3f}"),
                      format_over_seeds(row["difference"], "{:+.3f}") if name not in ("scratch", "base") else "–",
                      format_over_seeds(petaflops, "{:.4f}") if name != "base" else "–",
                      format_over_seeds(row["speed_up"], "{:+.0%}") if name not in ("scratch", "base") else "–"])
    return markdown_table(["model", "seeds", "loss after growth", "final loss", "difference to scratch",
                           "PFLOP to scratch's final loss", "speed-up"], lines)


def compare(rows: Sequence[dict], name: str, other: str) -> PairedDifference:
    """The differences of the final losses of two models, of the seeds that both have."""
    one, two = (dict(zip(row["seeds"], row["final"])) for wanted in (name, other) for row in rows
                if row["name"] == wanted)
    return PairedDifference(tuple(one[seed] - two[seed] for seed in one if seed in two))


def compared_text(name: str, other: str, found: PairedDifference) -> str:
    """The sentence on a difference of final losses."""
    low, high = found.interval
    interval = f" [{low:+.3f}, {high:+.3f}]" if found.n > 1 else ""
    wins = sum(value < 0 for value in found.values)
    return (f"{name} − {LABELS.get(other, other)}: {found.mean:+.3f}{interval} nats per token, lower for {wins} of "
            f"{found.n} seeds.")


def verdict(what: str, differences: Sequence[PairedDifference]) -> str:
    """The sentence on whether something pays: all differences must be below 0 by their 95% intervals. It does not if
    one of them is above 0."""
    if all(one.interval[1] < 0 for one in differences):
        return f"{what} pays at this budget."
    if any(one.interval[0] > 0 for one in differences):
        return f"{what} does not pay at this budget."
    return f"It cannot be told whether {what.lower()} pays at this budget: a 95% interval includes 0."


def conclusion(rows: Sequence[dict]) -> str:
    """Whether depth pays at this budget, and whether growing does: the final losses compared within seeds. Fewer than
    MIN_SEEDS seeds of all models that are compared give no verdict."""
    trained = {row["name"]: len(row["seeds"]) for row in rows}
    depth = compare(rows, "scratch", TRAINED_ON)
    controls = {other: compare(rows, "stack", other) for other in ("scratch", TRAINED_ON) if "stack" in trained}
    lines = [compared_text("scratch", TRAINED_ON, depth),
             *(compared_text("stack", other, found) for other, found in controls.items())]
    if depth.n < MIN_SEEDS:
        lines.append(f"No verdict: it takes at least {MIN_SEEDS} seeds, found {depth.n}. Give more --seeds.")
    else:
        lines.append(verdict("Depth", [depth]))
        if controls and trained["stack"] < MIN_SEEDS:
            lines.append(f"No verdict on growing: it takes at least {MIN_SEEDS} seeds of stack, found "
                         f"{trained['stack']}. Name stack in --repeated.")
        elif controls:
            lines.append(verdict("Growing", list(controls.values())))
    return "\n".join(f"- {line}" for line in lines) + "\n"


def style_of(name: str) -> dict[str, Any]:
    """Colour and line of a model: those of its operator and of its policy for the moments."""
    operator, _, policy = name.partition("-")
    lines = {"base": "--", "copied": "--", "zero": ":"}
    return {"color": COLOURS.get(name) or COLOURS[operator], "ls": lines.get(policy or name, "-")}


@styled
def plot_study(path: Path, runs: Mapping[int, Mapping[str, Curve]], title: str) -> None:
    """Plots loss over FLOPs of all runs to path.png and path.svg."""
    figure, (panel,) = make_panels(1, 7.2, 4.6)
    names = list(next(iter(runs.values())))
    curves = {LABELS.get(name, name): [of_seed[name] for of_seed in runs.values() if name in of_seed] for name in names}
    styles = {LABELS.get(name, name): style_of(name) | {"marker": "o", "ms": 2} for name in names}
    handles = draw_loss_curves(panel, curves, styles)
    goal = mean_curve(curves["scratch"])[-1][1]
    panel.axhline(goal, color=COLOURS["scratch"], lw=0.8, ls=":")
    for name, of_seeds in curves.items():
        if name not in ("base", "scratch") and (reached := flops_to_loss(mean_curve(of_seeds), goal)) is not None:
            panel.plot(reached, goal, "D", ms=7, color=styles[name]["color"], mec="white")
    panel.set_title(title)
    add_legend(figure, [*handles, Line2D([], [], ls="", marker="D", ms=7, color="#777777", mec="white",
                                         label="reaches scratch's final loss")])
    save_figure(figure, path)


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
