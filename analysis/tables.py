"""The sections of a report: tables of results, sentences that summarise them, and how to reproduce the runs."""
import math
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from analysis.benchmark_catalog import task_metric
from analysis.comparison import chain_key, key_name
from analysis.estimates import TASK_MEASURES, Estimate
from analysis.record import ComparedModels, Comparison, Record
from analysis.stages import Stage
from common.configs import below_root
from common.files import UserError, read_json
from common.formatting import markdown_table
from evaluation.suites import version_note

CATEGORIES = {"DK": "domain knowledge", "Rs": "reasoning", "RC": "reading comprehension"}  # of the published suite
BIAS = "Bias"  # the category in which neither direction is better, and whose parts are plotted as a heat map
PART = " (part)"  # marks a difference over the results that both have, where one has more

Section = tuple[str, str]  # (title, text in Markdown)


def result_tables(record: Record, noise: Collection[str] = ()) -> tuple[list[str], list[Section]]:
    """The sentences that compare the record's pair of models, if it has one, and the sections with the tables.

    noise: the benchmarks whose forgetting is noise, by name.
    """
    sentences, sections = forgetting_tables(record, noise)
    if record.tasks and any(record.learned):
        rows = {name: record.compare(record.task_measure(name)) for name in TASK_MEASURES}
        if record.compared:
            sentences.append(verdict("Backward transfer", record.compared, rows["backward transfer"], sign=-1))
        sections.append(("Over the tasks", f"After the last stage{record.at_rate}, in points of each task's metric: "
                         + ", ".join(f"{task} {task_metric(task)}" for task in record.tasks) + ".\n\n"
                         + model_table("", record, rows.items(), decimals=2)))
        for model in record.chains:
            lines = [[name, *(format_estimate(record.task_value(model, number, task)) for task in record.tasks)]
                     for number, name in enumerate(record.stages)]
            sections.append((f"Tasks by stage: {model}", markdown_table(["stage", *record.tasks], lines)))
    for model in record.chains if record.benchmarks else ():
        lines = [[b.category, b.label or b.name, b.metric,
                  *(format_estimate(record.benchmark_value(model, number, b.name), scale=100)
                    for number in range(record.last + 1))] for b in record.benchmarks]
        notes = "".join(f"{note}.\n\n" for b in record.benchmarks
                        if (note := version_note(b, record.version(model, b.name))))
        sections.append((f"Benchmarks by stage: {model}", notes + markdown_table(
            ["category", "benchmark", "metric (%)", *record.stages], lines)))
    return sentences, sections


def forgetting_tables(record: Record, noise: Collection[str]) -> tuple[list[str], list[Section]]:
    """The sentences and sections on FG by category and by benchmark."""
    if not record.benchmarks:
        return [], []
    by_category = {category: record.compare(record.category_measure(category)) for category in record.categories}
    by_benchmark = [(b.label or b.name, record.compare(record.fg_measure(b.name))) for b in record.benchmarks]
    claims = {BIAS: "in this pair the share of stereotypes fell {less} in {grown} than in {reference}"}
    sentences = [verdict(f"FG, {category}", record.compared, comparison, claims.get(category, FORGETS),
                         caveat=noise_caveat(record.counted_in(category), noise))
                 for category, comparison in by_category.items()] if record.compared else []
    names = [f"{short}: {name}" for short, name in CATEGORIES.items() if short in record.categories]
    note = (f"FG{record.at_rate} in percent of the start, mean over the stages; positive is forgetting. In brackets "
            f"the {record.interval_text}.")
    if names:
        note += f" {'; '.join(names)}."
    if BIAS in record.categories:
        note += f" {BIAS}: positive is a smaller share of stereotypes."
    if record.several_pairs:
        note += " Do not compare columns that are means over different pairs."
    note += "\n\n"
    return sentences, [
        ("Forgetting by category", note + model_table("category", record, by_category.items())),
        ("Forgetting by benchmark", model_table("benchmark", record, by_benchmark))]


def noise_caveat(counted: Sequence[str], noise: Collection[str]) -> str:
    """The caveat of a category some of whose benchmarks cannot show forgetting; "" if all can."""
    unable = [name for name in counted if name in noise]
    return f"{len(unable)} of its {len(counted)} benchmarks cannot show forgetting " \
        "(see Metrics whose forgetting is noise)" if unable else ""


FORGETS = "in this pair {grown} forgot {less} than {reference}"


def verdict(title: str, compared: ComparedModels, comparison: Comparison, claim: str = FORGETS, sign: int = 1,
            caveat: str = "") -> str:
    """A sentence on the difference of the compared models.

    claim: what to say of a significant difference; "{less}" becomes "less" if the difference has the opposite of
    `sign`, and "more" otherwise. sign: 1 if positive values are forgetting, -1 if negative ones are. caveat: why a
    significant difference does not support the claim; "" if it does.
    """
    grown, reference = compared
    gap = comparison.difference
    if gap is None:
        return (f"{title}: not compared, {grown} and {reference} have no results in common that count; the end of this "
                "report says what is missing or noise.")
    of_part = ", of what both have, see What is missing" if comparison.is_part else ""
    value, low, high = rounded(gap, sign="+")
    if math.isnan(gap.error):
        return f"{title}: the difference is {value}, without standard errors to judge it by{of_part}."
    interval = f"{value} points, 95% interval [{low}, {high}]{of_part}"
    if not gap.excludes_zero:
        return f"{title}: {grown} and {reference} cannot be told apart from noise ({interval})."
    if caveat:
        return f"{title}: the difference is {interval}, but {caveat}."
    less = "less" if sign * gap.value < 0 else "more"
    return f"{title}: {claim.format(grown=grown, reference=reference, less=less)} ({interval})."


def model_table(first: str, record: Record, rows: Iterable[tuple[str, Comparison]], decimals: int = 1) -> str:
    """A table of (title, comparison) with a column for each model and, for a pair, one for their difference.

    first: head of the column of titles.
    """
    lines, is_part = [], False
    for title, comparison in rows:
        lines.append([title, *(format_estimate(estimate, decimals) for estimate in comparison.values.values())])
        if record.compared:
            lines[-1].append(format_estimate(comparison.difference, decimals) + PART * comparison.is_part)
            is_part |= comparison.is_part
    note = ("\n(part): without the stages, benchmarks, test sets and seeds that only one of the two models has. They "
            "are listed under What is missing.\n")
    difference = [" − ".join(record.compared)] if record.compared else []
    return markdown_table([first, *map(record.title, record.chains), *difference], lines) + note * is_part


def table_of_values(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table without the columns that have no value ("–") in any row; "" if only the first column is left."""
    kept = [0, *(place for place in range(1, len(heads)) if any(row[place] != "–" for row in rows))]
    return markdown_table([heads[place] for place in kept], [[row[place] for place in kept] for row in rows]) \
        if len(kept) > 1 else ""


def format_estimate(estimate: Estimate | None, decimals: int = 1, scale: float = 1, sign: str = "") -> str:
    """An estimate times `scale`, with its 95% interval. sign: "+" to show it on positive numbers too."""
    if estimate is None:
        return "–"
    value, low, high = rounded(estimate, decimals, scale, sign)
    return value if math.isnan(estimate.error) else f"{value} [{low}, {high}]"


def rounded(estimate: Estimate, decimals: int = 1, scale: float = 1, sign: str = "") -> tuple[str, str, str]:
    """(value, low, high) of an estimate and its 95% interval, times `scale`, as text.

    It has more decimals where the bound of an interval that excludes 0 would be rounded to 0.
    """
    numbers = [scale * number for number in (estimate.value, *estimate.interval)]
    while estimate.excludes_zero and not all(round(number, decimals) for number in numbers):
        decimals += 1
    value, low, high = (f"{number:{sign}z.{decimals}f}" for number in numbers)
    return value, low, high


def reproduction_sections(stages: Iterable[Stage], folder: str | Path) -> list[Section]:
    """Provenance, settings and commands of all stages that have a run.json, as sections. folder: of the runs."""
    rows: list[list[Any]] = []
    commands: list[str] = []
    settings: dict[str, dict[str, Any]] = {}
    for stage in sorted(stages, key=place_of):
        if stage.run:
            chain = ", ".join([key_name(chain_key(stage)), *([stage.method] if stage.method and stage.number else []),
                               *([f"rate {stage.rate}"] if stage.rate else [])])
            digests = (f"`{str(stage.run.get(key))[:12]}`" for key in ("commit", "data_digest", "parent_digest"))
            rows.append([stage.model, stage.name, chain, *digests])
            commands += stage_commands(stage, Path(folder))
            settings[f"{stage.model}, {chain}, {stage.name}"] = stage.run["settings"]
    if not rows:
        return []
    shared = {name: value for name, value in next(iter(settings.values())).items()
              if all(values.get(name, ...) == value for values in settings.values())}
    own = {title: {name: value for name, value in values.items() if name not in shared}
           for title, values in settings.items()}
    lines = [f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
             for title, values in ({"all stages": shared} | own).items()]
    return [("Provenance", markdown_table(["model", "stage", "chain", "commit", "data", "parent"], rows)),
            ("Settings", "```\n" + "\n".join(lines) + "\n```\n"),
            ("Commands to reproduce the runs", "```\n" + "\n".join(dict.fromkeys(commands)) + "\n```\n")]


def place_of(stage: Stage) -> tuple:
    """The place of a stage in the order of an experiment: by pair and model, m0 first, then chain by chain."""
    return (stage.pair or 0, stage.model, stage.number > 0, stage.method_name, float(stage.rate or 0), stage.seed,
            stage.number)


def stage_commands(stage: Stage, folder: Path) -> list[str]:
    """The commands that trained and evaluated a stage, as the experiment recorded them, or else as in its run.json."""
    name = "-".join(stage.directory.relative_to(folder).parts) if stage.directory else stage.name
    recorded = [path for ending in ("", "-eval") if (path := folder / f"experiment/{name}{ending}.json").exists()]
    return [recorded_command(path) for path in recorded] or [train_command(stage.run["settings"])]


def recorded_command(path: Path) -> str:
    """The command in the experiment's record of a job, as typed in the project's folder."""
    command = read_json(path, dict).get("command")
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise UserError(f"{path} is damaged or not the record of a job: expected a list of words as its command")
    module = [] if command[0].endswith(".py") else ["-m"]
    return shlex.join(["python", *module, *map(below_root, command)])


def train_command(settings: dict[str, Any]) -> str:
    """The command of a training run with these settings. It gives all of them, since flags override the size's and the
    method's files."""
    flags = [(f"--{name}", flag_value(value)) for name, value in settings.items()]
    return shlex.join(["python", "train.py", *(word for name, value in flags for word in (
        (f"{name}={value}",) if value.startswith("-") else (name, value)))])


def flag_value(value: Any) -> str:
    """The value of a setting as its flag takes it."""
    if isinstance(value, list):
        return ",".join(map(flag_value, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
