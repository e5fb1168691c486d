"""The report: does the grown model forget less? Tables and figures from a folder of evaluated runs.

    python report.py --runs runs/tiny --out report                   stages made by this program
    python report.py --results some/folder --out report              <model>/<stage>/**/results_*.json of any lm-eval
    python report.py --results map.toml --out report                 a list of [[result]]: model, stage, file

Writes report.md, report.html (one file, with the figures in it) and the figures as PNG and SVG.
"""
import base64
import html
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from analysis import figures
from analysis.method_tables import compare
from analysis.pages import STYLE, to_html
from analysis.record import Record, measure
from analysis.results import read_results, read_runs
from analysis.tables import BIAS, tables
from common.files import UserError, explain_os_errors, read_json, write_text
from common.formatting import markdown_table
from common.settings import ROOT, run, setting


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report."""
    runs: str | None = setting(None, "folder of runs, such as runs/tiny")
    results: str | None = setting(None, "in place of runs: folder of lm-eval results, or a .toml file that names them")
    out: str = setting("report", "folder to write the report into")
    grown: str = setting("stack", "the model whose forgetting is compared")
    reference: str = setting("llm", "the model that it is compared with")
    method: str | None = setting(None, "the method whose stages are shown, and its models compared; none: baseline")
    baseline: str = setting("finetune", "the method that the others are compared with")
    categories: tuple[str, ...] = setting((), "only these categories; none: all that are found")

    def problems(self):
        return [] if (self.runs is None) != (self.results is None) else ["give either --runs or --results"]


def by_method(stages, described, cfg):
    """{method: Record} of stages, the baseline first; every method starts from the same m0. What was made without one
    is by the method "none"."""
    names = dict.fromkeys(stage.method or "none" for stage in stages if stage.number)
    starts = [stage for stage in stages if not stage.number]
    return {name: Record(starts + [stage for stage in stages if stage.number and (stage.method or "none") == name],
                         described, cfg.categories)
            for name in sorted(names or ["none"], key=lambda name: (name != cfg.baseline, name))}


def baseline(records, cfg):
    """The method that the others are compared with: the one asked for, or the first where it is not there."""
    return cfg.baseline if cfg.baseline in records else next(iter(records))


def chosen(records, cfg):
    """The method whose stages are shown. Raises UserError for one that was asked for and is not there."""
    if cfg.method is not None and cfg.method not in records:
        raise UserError(f"unknown method {cfg.method!r}, expected one of {', '.join(map(str, records))}")
    return baseline(records, cfg) if cfg.method is None else cfg.method


def compared(record, cfg):
    """The two models to compare, [grown, reference], or a sentence where there is nothing to compare: ([], sentences).

    Raises UserError for a model that was asked for and is not there.
    """
    models, pair, defaults = list(record.chains), [cfg.grown, cfg.reference], ReportConfig()
    if lacking := [name for name in pair if name not in models]:
        if pair != [defaults.grown, defaults.reference]:
            raise UserError(f"unknown model {', '.join(lacking)}, expected some of {', '.join(models)}")
        more = ": give --grown and --reference to compare two" if len(models) > 1 else ""
        return [], [f"The models are {', '.join(models)}{more}."]
    return pair, []


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
    return [("What the runs are made of", markdown_table(["model", "stage", "seed", "commit", "data", "parent"], rows)),
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
            found = [(stage.calibration[benchmark.name].ece, 100 * stage.calibration[benchmark.name].accuracy)
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


def main(cfg):
    """Reads, draws and writes."""
    records, out = by_method(*(read_runs(cfg.runs) if cfg.runs else read_results(cfg.results)), cfg), Path(cfg.out)
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    record = records[chosen(records, cfg)]
    pair, sentences = compared(record, cfg)
    found, sections = tables(record, pair)
    sentences += found
    if len(records) > 1:
        found, more = compare(records, baseline(records, cfg))
        sentences, sections = sentences + found, more + sections
    captions = draw(record, out)
    sections += provenance(record, cfg.runs) if cfg.runs else []
    title = f"Forgetting of {' and '.join(record.chains)} over {len(record.stages)} stages"
    title += f" with the method {chosen(records, cfg)}" if len(records) > 1 else ""
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
    run((ReportConfig, main), __doc__)
