"""The report: does the grown model forget less? Tables and figures from a folder of evaluated runs.

    python report.py --runs runs/tiny --out report                   stages made by this program
    python report.py --results some/folder --out report              <model>/<stage>/**/results_*.json of any lm-eval
    python report.py --results map.toml --out report                 a list of [[result]]: model, stage, file

Writes report.md, report.html (one file, with the figures in it) and the figures as PNG and SVG.
"""
import base64
import html
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import figures
from metrics import average_performance, backward_transfer, forgetting_from_best
from model.files import UserError, explain_os_errors, read_json, write_text
from record import Record, measure
from results import read_results, read_runs
from settings import ROOT, run, setting

BIAS = "Bias"  # the category whose parts are drawn as a heat map


@dataclass(frozen=True)
class ReportSettings:
    """Settings of a report."""
    runs: str | None = setting(None, "folder of runs, such as runs/tiny")
    results: str | None = setting(None, "in place of runs: folder of lm-eval results, or a .toml file that names them")
    out: str = setting("report", "folder to write the report into")
    grown: str = setting("stack", "the model whose forgetting is compared")
    reference: str = setting("llm", "the model that it is compared with")
    categories: tuple[str, ...] = setting((), "only these categories; none: all that are found")

    def problems(self):
        return [] if (self.runs is None) != (self.results is None) else ["give either --runs or --results"]


# ------------------------------------------------------------------------------------------------------------- tables

def show(estimate, form="{:z.1f}"):
    """An estimate with its 95% interval, as text."""
    if estimate is None:
        return "–"
    text = form.format(estimate.value)
    if math.isnan(estimate.error):
        return text
    low, high = estimate.interval
    return f"{text} [{form.format(low)}, {form.format(high)}]"


def table(head, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def verdict(what, grown, reference, difference, claim="{grown} forgets {less} than {reference}", sign=1):
    """A plain sentence on a difference grown - reference. claim: what it says where there is one, with "less" for
    differences of the sign -1 (or 1, where `sign` is -1) and "more" for others."""
    if difference is None:
        return f"{what}: nothing to compare."
    if math.isnan(difference.error):
        return f"{what}: the difference is {difference.value:+z.1f}, without standard errors to judge it by."
    low, high = difference.interval
    interval = f"{difference.value:+z.1f} points, 95% interval [{low:+z.1f}, {high:+z.1f}]"
    if low <= 0 <= high:
        return f"{what}: {grown} and {reference} cannot be told apart from noise ({interval})."
    less = "less" if sign * difference.value < 0 else "more"
    return f"{what}: {claim.format(grown=grown, reference=reference, less=less)} ({interval})."


def difference(one, two):
    """one - two, None where either is."""
    return None if one is None or two is None else one - two


def compared(record, s):
    """The two models to compare, [grown, reference], and a sentence where there is nothing to compare: ([], sentence).

    Raises UserError for a model that was asked for and is not there.
    """
    models, pair, defaults = list(record.chains), [s.grown, s.reference], ReportSettings()
    if lacking := [name for name in pair if name not in models]:
        if pair != [defaults.grown, defaults.reference]:
            raise UserError(f"unknown model {', '.join(lacking)}, expected some of {', '.join(models)}")
        more = ": give --grown and --reference to compare two" if len(models) > 1 else ""
        return [], [f"The models are {', '.join(models)}{more}."]
    return pair, []


def category_verdict(record, category, pair, found):
    """The sentence on a category's FG, which takes the same stages and benchmarks of both models."""
    title, (grown, reference) = f"FG, {category}", pair
    if record.measured(grown, category) != record.measured(reference, category):
        return f"{title}: not compared, the models do not have the same stages and benchmarks (see What is missing)."
    claim = {"claim": "the share of stereotypes fell {less} in {grown} than in {reference}"} if category == BIAS else {}
    return verdict(title, grown, reference, difference(found[grown], found[reference]), **claim)


def tables(record, s):
    """The sentences of the summary, and the sections of tables, as (title, text in Markdown)."""
    models = list(record.chains)
    pair, sentences = compared(record, s)
    gap = [" − ".join(pair)] if pair else []

    def row(name, estimates, form="{:z.1f}"):
        found = [estimates[model] for model in models]
        extra = [difference(*(estimates[model] for model in pair))] if pair else []
        return [name, *(show(estimate, form) for estimate in found + extra)]

    sections, rows = [], []
    for category in record.categories:
        found = {model: record.category_fg(model, category) for model in models}
        rows.append(row(category, found))
        if pair:
            sentences.append(category_verdict(record, category, pair, found))
    if rows:
        sections.append(("Forgetting by category", "FG in percent of the start, the mean over the stages; positive is "
                         "forgetting. In brackets the 95% interval from the benchmarks' standard errors"
                         + (" and the seeds" if max(map(len, record.chains.values())) > 1 else "") + ".\n\n"
                         + table(["category", *models, *gap], rows)))
        rows = [row(b.label or b.name, {model: record.fg(model, b.name) for model in models})
                for b in record.benchmarks]
        sections.append(("Forgetting by benchmark", table(["benchmark", *models, *gap], rows)))
    if record.tasks and any(record.learned):
        measures = [("average performance", average_performance), ("backward transfer", backward_transfer),
                    ("forgetting from the best stage", forgetting_from_best)]
        rows = []
        for name, function in measures:
            found = {model: record.over(model, lambda chain, function=function: function(
                record.matrix(chain), record.last, record.learned)) for model in models}
            rows.append(row(name, found, "{:z.2f}"))
            if pair and function is backward_transfer:
                sentences.append(verdict("Backward transfer", *pair, difference(*(found[model] for model in pair)),
                                         sign=-1))
        sections.append(("Over the tasks", "After the last stage, in points of each task's measure: "
                         + ", ".join(f"{task} {measure(task)}" for task in record.tasks) + ".\n\n"
                         + table(["", *models, *gap], rows)))
        for model in models:
            rows = [[name, *(show(record.over(model, lambda chain, task=task, number=number:
                                              record.matrix(chain).get((number, task)))) for task in record.tasks)]
                    for number, name in enumerate(record.stages)]
            sections.append((f"Tasks by stage: {model}", table(["stage", *record.tasks], rows)))
    for model in models:
        rows = [[b.category, b.label or b.name, b.metric,
                 *(show(percent(record.value(model, number, b.name))) for number in range(record.last + 1))]
                for b in record.benchmarks]
        if rows:
            sections.append((f"Benchmarks by stage: {model}",
                             table(["category", "benchmark", "figure (%)", *record.stages], rows)))
    if record.missing:
        sections.append(("What is missing", "".join(f"- {line}\n" for line in record.missing)))
    return sentences, sections


def percent(estimate):
    """A share as a percentage."""
    return None if estimate is None else type(estimate)(100 * estimate.value, 100 * estimate.error)


def provenance(record, folder):
    """What the runs were made of, and the commands that make them again, as sections."""
    rows, commands, settings = [], [], {}
    for model, seeds in record.chains.items():
        for seed, chain in seeds.items():
            for _, stage in sorted(chain.items()):
                if run := stage.run:
                    rows.append([model, stage.name, seed, *(f"`{str(run.get(key))[:12]}`" for key in
                                                            ("commit", "data_digest", "parent_digest"))])
                    commands += stage_commands(stage, folder)
                    settings[f"{model}, seed {seed}, {stage.name}"] = run["settings"]
    if not rows:
        return []
    common = {name: value for name, value in next(iter(settings.values())).items()
              if all(found.get(name, ...) == value for found in settings.values())}
    lines = [f"all stages: {words_of(common)}"] + [
        f"{title}: {words_of({name: value for name, value in found.items() if name not in common})}"
        for title, found in settings.items()]
    return [("What the runs are made of", table(["model", "stage", "seed", "commit", "data", "parent"], rows)),
            ("Settings", "```\n" + "\n".join(lines) + "\n```\n"),
            ("Commands that make them again", "```\n" + "\n".join(dict.fromkeys(commands)) + "\n```\n")]


def words_of(settings):
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def plain(command):
    """A step's command as one types it in the project's folder."""
    module = [] if command[0].endswith(".py") else ["-m"]
    return shlex.join(["python", *module, *(word.removeprefix(f"{ROOT}/") for word in command)])


def stage_commands(stage, folder):
    """The commands that made a stage and evaluated it, as the experiment wrote them down; else its run.json's."""
    name = "-".join(stage.directory.relative_to(folder).parts)
    steps = [path for path in (Path(folder) / f"experiment/{name}{end}.json" for end in ("", "-eval")) if path.exists()]
    return [plain(read_json(path)["command"]) for path in steps] or [train_command(stage.run)]


def train_command(run):
    """The command of a training run, from its run.json."""
    flags = [word for name, value in run["settings"].items() if value is not None and name not in ("size", "phase")
             for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))]
    return shlex.join(["python", "train.py", *flags])


# ------------------------------------------------------------------------------------------------------------ figures

def draw(record, folder):
    """Draws what there is to draw; returns {file name without ending: caption}."""
    captions = {}

    def add(name, caption, function, *given, **options):
        function(folder / name, *given, **options)
        captions[name] = caption

    models = list(record.chains)
    several = " (the first seed)" if max(map(len, record.chains.values())) > 1 else ""
    labels = ["start" if stage == "m0" else stage for stage in record.stages]
    curves = {category: {b.label or b.name: {
        model: [record.value(model, number, b.name) for number in range(record.last + 1)] for model in models}
        for b in record.of_category(category)} for category in record.categories}
    if curves:
        add("benchmarks", "Each benchmark over the stages, with 95% intervals.", figures.benchmarks_over_stages, curves,
            labels)
        bars = {category: {model: record.category_fg(model, category) for model in models}
                for category in record.categories}
        if any(estimate for found in bars.values() for estimate in found.values()):
            add("forgetting", "FG by category, with 95% intervals.", figures.forgetting_by_category, bars)
    parts = record.of_category(BIAS, parts=True)
    if parts:
        cells = {model: [[(value := record.value(model, number, b.name)) and 100 * value.value
                          for number in range(record.last + 1)] for b in parts] for model in models}
        add("bias", "Share of pairs in which the stereotype is the more probable sentence (%); 50 is even.",
            figures.heat_maps, cells, [b.label or b.name for b in parts], labels, "PuOr_r",
            "stereotype (%)", scale=(0, 100))
    if record.tasks:
        cells = {model: [[(value := record.over(model, lambda chain, task=task, number=number:
                                                record.matrix(chain).get((number, task)))) and value.value
                          for task in record.tasks] for number in range(record.last + 1)] for model in models}
        add("tasks", "Each task's measure at every stage; colours by column.", figures.heat_maps, cells, labels,
            [f"{task} ({measure(task)})" for task in record.tasks], "cividis", "colours: lowest to highest of a column",
            form="{:z.1f}")
    runs = {}
    for number, name in enumerate(record.stages):
        for model, seeds in record.chains.items():
            stage = next(iter(seeds.values())).get(number)
            if stage and stage.log:
                runs.setdefault(name, {})[model] = curve(stage)
    if runs:
        add("losses", f"Loss over tokens, a panel a stage{several}.", figures.losses, runs)
    points = {}
    for benchmark in (b for b in record.benchmarks if not b.part_of):
        for model, seeds in record.chains.items():
            chain = next(iter(seeds.values()))
            found = [(stage.calibration[benchmark.name][0], 100 * stage.calibration[benchmark.name][1])
                     for _, stage in sorted(chain.items()) if benchmark.name in stage.calibration]
            if found:
                points.setdefault(benchmark.label or benchmark.name, {})[model] = found
    if points:
        add("calibration", f"Accuracy against expected calibration error, stages joined in order{several}.",
            figures.accuracy_over_calibration, points)
    return captions


def curve(stage):
    """(training losses, eval losses, ends of epochs) over the tokens of a stage."""
    steps = [(line["tokens"], line["loss"]) for line in stage.log if "loss" in line]
    tokens = {line["step"]: line["tokens"] for line in stage.log if "tokens" in line} | {0: 0}
    total = max(tokens.values())
    evals = [(tokens.get(line["step"], total), line["eval_loss"]) for line in stage.log if "eval_loss" in line]
    settings = stage.run.get("settings", {})
    epochs = settings.get("num_train_epochs") if settings.get("task") and not settings.get("max_steps") else None
    borders = [total * number / epochs for number in range(1, math.floor(epochs))] if epochs else []
    return steps, evals, borders


# --------------------------------------------------------------------------------------------------------------- pages

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;
text-align:left}img{max-width:100%}pre{overflow-x:auto;background:#f6f6f6;padding:1rem;font-size:.75rem}
figure{margin:1.5rem 0}figcaption{color:#555}"""


def to_html(text):
    """The Markdown that this module writes, as HTML: paragraphs, lists, tables, code."""
    parts = []
    for block in re.split(r"\n\n+", text.strip()):
        lines = block.splitlines()
        if block.startswith("```"):
            parts.append("<pre>" + html.escape("\n".join(lines[1:-1])) + "</pre>")
        elif block.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            cells = lambda row, kind: "".join(f"<{kind}>{inline(cell)}</{kind}>" for cell in row)  # noqa: E731
            parts.append(f"<table><tr>{cells(head, 'th')}</tr>"
                         + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</table>")
        elif block.startswith("- "):
            parts.append("<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(parts)


def inline(text):
    """Text with `code` as HTML."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))


def main(s):
    """Reads, draws and writes."""
    record, out = Record(*(read_runs(s.runs) if s.runs else read_results(s.results)), s.categories), Path(s.out)
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    sentences, sections = tables(record, s)
    captions = draw(record, out)
    sections += provenance(record, s.runs) if s.runs else []
    title = f"Forgetting of {' and '.join(record.chains)} over {len(record.stages)} stages"
    summary = "".join(f"- {sentence}\n" for sentence in sentences)
    images = "".join(f"![{caption}]({name}.png)\n\n" for name, caption in captions.items())
    body = "".join(f"## {name}\n\n{text}\n" for name, text in sections)
    write_text(out / "report.md", f"# {title}\n\n{summary}\n{images}{body}")
    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode((out / f"{name}.png").read_bytes()).decode()}"><figcaption>{html.escape(caption)}'
        "</figcaption></figure>\n" for name, caption in captions.items())
    page = "\n".join(f"<h2>{html.escape(name)}</h2>\n{to_html(text)}" for name, text in sections)
    write_text(out / "report.html", f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
               f"</title><style>{STYLE}</style><body><h1>{html.escape(title)}</h1>\n{to_html(summary)}\n{pictures}{page}"
               "</body></html>\n")
    print(summary + f"report: {out / 'report.html'}")


if __name__ == "__main__":
    run((ReportSettings, main), __doc__)
