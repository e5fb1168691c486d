"""The sections of a report: tables of results, sentences that summarise them, and how to reproduce the runs."""
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from analysis.record import Record, task_metric
from analysis.results import Stage
from analysis.statistics import TASK_MEASURES, Estimate
from common.files import read_json
from common.formatting import markdown_table
from common.settings import ROOT

BIAS = "Bias"  # the category in which neither direction is better, and whose parts are plotted as a heat map

Pair = tuple[str, str]  # the models to compare: (grown, reference)
Section = tuple[str, str]  # (title, text in Markdown)
Estimates = dict[str, Estimate | None]  # by model


def result_tables(record: Record, pair: Pair | None) -> tuple[list[str], list[Section]]:
    """The sentences that compare a pair of models, if one is given, and the sections with the tables."""
    sentences, sections = forgetting_tables(record, pair)
    if record.tasks and any(record.learned):
        measures = {name: {model: record.task_measure(model, name) for model in record.chains}
                    for name in TASK_MEASURES}
        if pair:
            sentences.append(verdict("Backward transfer", pair, measures["backward transfer"], sign=-1))
        sections.append(("Over the tasks", "After the last stage, in points of each task's metric: "
                         + ", ".join(f"{task} {task_metric(task)}" for task in record.tasks) + ".\n\n"
                         + model_table("", record, pair, measures.items(), "{:z.2f}")))
        for model in record.chains:
            rows = [[name, *(format_estimate(record.task_value(model, number, task)) for task in record.tasks)]
                    for number, name in enumerate(record.stages)]
            sections.append((f"Tasks by stage: {model}", markdown_table(["stage", *record.tasks], rows)))
    for model in record.chains if record.benchmarks else ():
        rows = [[b.category, b.label or b.name, b.metric,
                 *(format_estimate(record.benchmark_value(model, number, b.name), "{:z.1f}", 100)
                   for number in range(record.last + 1))] for b in record.benchmarks]
        sections.append((f"Benchmarks by stage: {model}",
                         markdown_table(["category", "benchmark", "metric (%)", *record.stages], rows)))
    if record.missing:
        sections.append(("What is missing", "".join(f"- {line}\n" for line in record.missing)))
    return sentences, sections


def forgetting_tables(record: Record, pair: Pair | None) -> tuple[list[str], list[Section]]:
    """The sentences and sections on FG by category and by benchmark."""
    if not record.benchmarks:
        return [], []
    by_category = {category: {model: record.category_fg(model, category) for model in record.chains}
                   for category in record.categories}
    by_benchmark = [(b.label or b.name, {model: record.benchmark_fg(model, b.name) for model in record.chains})
                    for b in record.benchmarks]
    sentences = [category_verdict(record, category, pair, estimates)
                 for category, estimates in by_category.items()] if pair else []
    note = ("FG in percent of the start, mean over the stages; positive is forgetting. In brackets the 95% interval "
            "from the benchmarks' standard errors" + " and the seeds" * record.several_seeds + ".\n\n")
    return sentences, [
        ("Forgetting by category", note + model_table("category", record, pair, by_category.items())),
        ("Forgetting by benchmark", model_table("benchmark", record, pair, by_benchmark))]


def category_verdict(record: Record, category: str, pair: Pair, estimates: Estimates) -> str:
    """A sentence that compares a category's FG, if both models have the same stages and benchmarks."""
    title, (grown, reference) = f"FG, {category}", pair
    if record.measured(grown, category) != record.measured(reference, category):
        return f"{title}: not compared, the models do not have the same stages and benchmarks (see What is missing)."
    if category == BIAS:
        return verdict(title, pair, estimates, "the share of stereotypes fell {less} in {grown} than in {reference}")
    return verdict(title, pair, estimates)


def verdict(title: str, pair: Pair, estimates: Estimates, claim: str = "{grown} forgets {less} than {reference}",
            sign: int = 1) -> str:
    """A sentence on the difference of a pair. claim: what to say of a significant difference; "{less}" becomes "less"
    if the difference has the opposite of `sign`, and "more" otherwise. sign: 1 if positive values are forgetting, -1 if
    negative ones are."""
    grown, reference = pair
    gap = difference(estimates[grown], estimates[reference])
    if gap is None:
        return f"{title}: nothing to compare."
    if math.isnan(gap.error):
        return f"{title}: the difference is {gap.value:+z.1f}, without standard errors to judge it by."
    low, high = gap.interval
    interval = f"{gap.value:+z.1f} points, 95% interval [{low:+z.1f}, {high:+z.1f}]"
    if low <= 0 <= high:
        return f"{title}: {grown} and {reference} cannot be told apart from noise ({interval})."
    less = "less" if sign * gap.value < 0 else "more"
    return f"{title}: {claim.format(grown=grown, reference=reference, less=less)} ({interval})."


def difference(one: Estimate | None, two: Estimate | None) -> Estimate | None:
    """one - two, None if either is None."""
    return None if one is None or two is None else one - two


def model_table(first: str, record: Record, pair: Pair | None, rows: Iterable[tuple[str, Estimates]],
                form: str = "{:z.1f}") -> str:
    """A table of (title, estimates) with a column for each model and, for a pair, one for their difference.

    first: head of the column of titles.
    """
    lines = []
    for title, estimates in rows:
        gap = [difference(estimates[pair[0]], estimates[pair[1]])] if pair else []
        lines.append([title, *(format_estimate(estimate, form) for estimate in [*estimates.values(), *gap])])
    return markdown_table([first, *record.chains, *([" − ".join(pair)] if pair else [])], lines)


def format_estimate(estimate: Estimate | None, form: str = "{:z.1f}", scale: float = 1) -> str:
    """An estimate times `scale`, with its 95% interval."""
    if estimate is None:
        return "–"
    value, low, high = (form.format(scale * number) for number in (estimate.value, *estimate.interval))
    return value if math.isnan(estimate.error) else f"{value} [{low}, {high}]"


def reproduction_sections(record: Record, folder: str | Path) -> list[Section]:
    """Provenance, settings and commands of all stages that have a run.json, as sections. folder: of the runs."""
    rows: list[list[Any]] = []
    commands: list[str] = []
    settings: dict[str, dict[str, Any]] = {}
    for model, seed, chain in record.all_chains():
        for stage in (stage for _, stage in sorted(chain.items()) if stage.run):
            digests = (f"`{str(stage.run.get(key))[:12]}`" for key in ("commit", "data_digest", "parent_digest"))
            rows.append([model, stage.name, seed, *digests])
            commands += stage_commands(stage, Path(folder))
            settings[f"{model}, seed {seed}, {stage.name}"] = stage.run["settings"]
    if not rows:
        return []
    shared = {name: value for name, value in next(iter(settings.values())).items()
              if all(values.get(name, ...) == value for values in settings.values())}
    own = {title: {name: value for name, value in values.items() if name not in shared}
           for title, values in settings.items()}
    lines = [f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
             for title, values in ({"all stages": shared} | own).items()]
    return [("Provenance", markdown_table(["model", "stage", "seed", "commit", "data", "parent"], rows)),
            ("Settings", "```\n" + "\n".join(lines) + "\n```\n"),
            ("Commands to reproduce the runs", "```\n" + "\n".join(dict.fromkeys(commands)) + "\n```\n")]


def stage_commands(stage: Stage, folder: Path) -> list[str]:
    """The commands that trained and evaluated a stage, as the experiment recorded them, or else as in its run.json."""
    name = "-".join(stage.directory.relative_to(folder).parts) if stage.directory else stage.name
    recorded = [path for ending in ("", "-eval") if (path := folder / f"experiment/{name}{ending}.json").exists()]
    return [script_command(read_json(path)["command"]) for path in recorded] or [train_command(stage.run["settings"])]


def script_command(command: Sequence[str]) -> str:
    """A recorded command as typed in the project's folder."""
    module = [] if command[0].endswith(".py") else ["-m"]
    return shlex.join(["python", *module, *(word.removeprefix(f"{ROOT}/") for word in command)])


def train_command(settings: dict[str, Any]) -> str:
    """The command of a training run with these settings."""
    flags = [word for name, value in settings.items() if value is not None and name not in ("size", "phase")
             for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))]
    return shlex.join(["python", "train.py", *flags])
