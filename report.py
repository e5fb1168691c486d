"""The report: does the grown model forget less? Tables and figures from a folder of evaluated runs.

    python report.py --runs runs/tiny --out report                   stages made by this program
    python report.py --results some/folder --out report              <model>/<stage>/**/results_*.json of any lm-eval
    python report.py --results map.toml --out report                 a list of [[result]]: model, stage, file
    python report.py --results report/stages.csv --out again         the table that another report wrote

Writes report.md, report.html (one file, with the figures in it), the figures as PNG and SVG, and stages.csv, a table of
the results of all stages. A report made from this table gives the same answer, without what needs logs, settings or the
answers to single items. Read with it are items.jsonl, the losses of single items, and primary.json, the measure that
was named before the first run, which lie next to it. The rows of several tables can be put into one file, and so can
the lines of several items.jsonl.
"""
import common.preamble

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.comparison import usable_stages
from analysis.flips import constant_benchmarks, noise_flags
from analysis.item_table import ITEMS, item_table, with_items
from analysis.left_out import all_left_out
from analysis.measures import (
    PRIMARY,
    PRIMARY_FILE,
    check_measure,
    make_measures,
    primary_file,
    read_primary,
    write_primary,
)
from analysis.method_figures import plot_planes
from analysis.method_interaction import interaction_section, left_out_of_interaction
from analysis.method_plane import finished_methods, left_out_of_plane, method_study, plane_section
from analysis.method_tables import compare_methods
from analysis.pages import markdown_image, markdown_list, write_pages
from analysis.pair_answer import answer
from analysis.pair_figures import plot_pairs
from analysis.pair_tables import pair_sections
from analysis.pairs import Study
from analysis.record import ComparedModels, Record, records_by_method
from analysis.record_figures import plot_record
from analysis.results import read_results, read_runs
from analysis.stage_table import read_stage_table, stage_table
from analysis.stages import Stage, middle_rate, rates_of
from analysis.tables import Section, reproduction_sections, result_tables
from common.files import UserError
from common.scripts import run
from common.settings import setting
from common.writing import explain_os_errors, write_text


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report."""
    runs: str | None = setting(None, "folder of runs, such as runs/tiny")
    results: str | None = setting(None, "instead of runs: folder of lm-eval results, a .toml file that lists them, or "
                                        "the stages.csv of another report")
    out: str = setting("report", "folder to write the report into")
    grown: str = setting("stack", "the model whose forgetting is compared")
    reference: str = setting("llm", "the model to compare it with")
    method: str = setting("", "the method whose stages are shown and models compared; none: the stages without a "
                              "method; not given: the baseline")
    baseline: str = setting("", "the method to compare the other methods with; none: the stages without a method; not "
                                "given: finetune, or else none, if there are such stages")
    primary: str | None = setting(None, "the measure that answers the question; all others are secondary; none: the "
                                        f"one that experiment.py recorded before the first run, or else {PRIMARY}")
    rate: float | None = setting(None, "learning rate at which models and methods are compared without matching their "
                                       "learning; none, or not run with a method: the middle one of the method (of two "
                                       "the smaller)", above=0)
    effect: float = setting(0.05, "difference for which the report gives the number of pairs needed, in units of the "
                                  "primary measure",
                            at_least=1e-9)
    constant: bool = setting(False, "count benchmarks in the FG of their categories that have the same value for all "
                                    "models and stages, as in published figures")
    categories: tuple[str, ...] = setting((), "only these categories; none: all categories in the results")

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        if (self.runs is None) == (self.results is None):
            return ["give either --runs or --results"]
        if self.grown == self.reference:
            return [f"grown and reference are both {self.grown}: give two models"]
        if self.results and Path(self.results).resolve().parent == Path(self.out).resolve():
            return [f"{self.results} lies in the report that it came from, which has more than its table: choose "
                    "another --out"]
        return []


def read_stages(cfg: ReportConfig) -> list[Stage]:
    """The stages to report on."""
    if cfg.runs:
        return read_runs(cfg.runs)
    path = Path(str(cfg.results))
    return with_items(read_stage_table(path), path.with_name(ITEMS)) if path.suffix == ".csv" else read_results(path)


def compared_models(stages: Sequence[Stage], cfg: ReportConfig) -> ComparedModels | None:
    """The two models to compare. None if the defaults are missing. Raises UserError if requested models are."""
    models, defaults = list(dict.fromkeys(stage.model for stage in stages)), ReportConfig()
    missing = [name for name in (cfg.grown, cfg.reference) if name not in models]
    if missing and (cfg.grown, cfg.reference) != (defaults.grown, defaults.reference):
        raise UserError(f"unknown model {', '.join(missing)}, expected some of {', '.join(models)}")
    return None if missing else (cfg.grown, cfg.reference)


def shared_rates(stages: Sequence[Stage], cfg: ReportConfig) -> dict[str, str]:
    """{method: learning rate} at which methods are compared without matching: the requested one if the method has it,
    otherwise the middle of its rates with benchmarks or decoded test sets, or of all its rates if there are no such
    ones. Raises UserError if no method has the requested one."""
    methods = {method: rates_of([stage for stage in stages if stage.method_name == method])
               for method in dict.fromkeys(stage.method_name for stage in stages if stage.number)} or {"none": [""]}
    whole = {method: rates_of([stage for stage in stages if stage.method_name == method
                               and (stage.benchmarks or stage.tasks)]) for method in methods}
    given = {method: rate for method, rates in methods.items() for rate in rates if rate and float(rate) == cfg.rate}
    if cfg.rate is not None and not given:
        known = ", ".join(filter(None, rates_of(stages))) or "none"
        raise UserError(f"unknown rate {cfg.rate:g}, expected one of {known}: the runs of a rate are in folders "
                        "rate-<rate>")
    return {method: middle_rate(whole[method] if any(whole[method]) else rates)
            for method, rates in methods.items()} | given


def baseline_of(stages: Sequence[Stage], requested: str) -> str:
    """The method that the others are compared with. Raises UserError if there are no runs of the requested one."""
    methods = sorted({stage.method_name for stage in stages if stage.number} or {"none"})
    if requested and requested not in methods:
        raise UserError(f"unknown baseline {requested!r}, expected one of {', '.join(methods)}")
    return requested or next((name for name in ("finetune", "none") if name in methods), methods[0])


def make_records(stages: Sequence[Stage], cfg: ReportConfig, compared: ComparedModels | None,
                 rates: Mapping[str, str]) -> dict[str, Record]:
    """{method: Record}, the baseline first, of the runs of each method at one learning rate. Differences between models
    are those of a single pair; of several pairs only the means are shown, since the study compares them. Raises
    UserError if there are no runs of a requested baseline."""
    is_single = len({stage.pair for stage in stages}) == 1
    shown = [stage for stage in stages if not stage.number or (stage.rate or "") == rates[stage.method_name]]
    return records_by_method(shown, cfg.categories, baseline_of(stages, cfg.baseline), compared if is_single else None,
                             () if cfg.constant else constant_benchmarks(stages))


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of a report.

    Attributes:
        records: {method: its runs at one learning rate}, the baseline first.
        rates: {method: this rate}.
        method: the one that is shown.
        study: the pairs of models with this method; None without such a pair.
        planes: {model: the study of its methods}, of the models that have one.
        primary: the measure that answers the question.
        recorded: the measure that was named before the first run; None if it is not known.
    """
    records: dict[str, Record]
    rates: dict[str, str]
    method: str
    study: Study | None
    planes: dict[str, Study]
    primary: str
    recorded: str | None


def with_method(name: str) -> str:
    """The method as it is named in a sentence."""
    return "without a method" if name == "none" else f"with the method {name}"


def describe(compared: Comparisons, effect: float,
             noise: Collection[str]) -> tuple[list[str], list[Section], list[str]]:
    """The sentences and sections of a report, the answers first, and sentences on what is missing.

    effect: the difference whose number of pairs is told. noise: the metrics whose forgetting is noise.
    """
    records, study, planes, primary = compared.records, compared.study, compared.planes, compared.primary
    record, baseline = records[compared.method], next(iter(records))
    sentences, sections, missing = [], [], []
    if study is None:
        hint = ": give --grown and --reference to compare two" if len(record.chains) > 1 else ""
        sentences.append(f"The models are {', '.join(record.chains)}{hint}.")
    else:
        if len(records) > 1:
            sentences.append(f"The models were fine-tuned {with_method(compared.method)}; --method shows the others: "
                             + ", ".join(name for name in records if name != compared.method) + ".")
        sentences += answer(study, primary, effect)
        sections += pair_sections(study, primary, compared.rates[compared.method], effect)
        missing += all_left_out(study)
    for plane in planes.values():
        plane_sentences, section = plane_section(plane, primary)
        sentences, sections = sentences + plane_sentences, [*sections, section]
        missing += [*left_out_of_plane(plane, primary), *all_left_out(plane)]
    studies = [*([study] if study else []), *planes.values()]
    if any(study.trained_otherwise for study in studies):
        sentences.append("Not all of these runs were fine-tuned alike, so that differences may come from that: see "
                         "What is missing.")
    if study:
        sections += interaction_section(planes, study.compared, primary)
        missing += left_out_of_interaction(planes, study.compared, primary)
    more_sentences, tables = result_tables(record, noise)
    missing += [line for of_method in records.values() for line in of_method.missing]
    if len(records) > 1:
        matched = [model for model, plane in planes.items() if plane.matches_learning]
        method_sentences, method_sections, left_out = compare_methods(records, baseline, compared.rates, matched)
        more_sentences, tables, missing = more_sentences + method_sentences, method_sections + tables, \
            missing + left_out
        missing += [f"the methods of {model} are not compared at equal learning: this takes the {primary} of "
                    f"{baseline} and of another method, after the last stage"
                    for model in record.chains if model not in planes]
    return sentences + more_sentences, sections + tables, missing


def method_studies(stages: Sequence[Stage], baseline: str, primary: str, recorded: str | None) -> dict[str, Study]:
    """{model: the study of its methods}, for the models of which the baseline and another method have the primary
    measure after the last stage. recorded: the one named before the first run."""
    studies = {}
    for model in dict.fromkeys(stage.model for stage in stages):
        study = method_study(stages, model, baseline, recorded)
        finished = finished_methods(study, primary) if study and primary in study.measures else []
        if study and baseline in finished and len(finished) > 1:
            studies[model] = study
    return studies


def with_choices_of(stages: Sequence[Stage], names: Collection[str]) -> list[Stage]:
    """The stages with the answers to some benchmarks only."""
    return [replace(stage, choices={name: choices for name, choices in stage.choices.items() if name in names})
            for stage in stages]


def recorded_primary(cfg: ReportConfig) -> str | None:
    """The primary measure that was named before the first run; None if it is not known."""
    if cfg.runs:
        return read_primary(primary_file(cfg.runs))
    path = Path(str(cfg.results))
    return read_primary(path.with_name(PRIMARY_FILE)) if path.suffix == ".csv" else None


def primary_measure(requested: str | None, recorded: str | None, measures: Collection[str]) -> str:
    """The measure that answers the question: the requested one, or else the recorded one, or else PRIMARY. Raises
    UserError if the results do not have it."""
    primary = requested or recorded or PRIMARY
    if primary == recorded and primary not in measures:
        raise UserError(f"these results do not have {primary}, the primary measure that the experiment recorded: leave "
                        "out --categories, or give --primary")
    check_measure(primary, measures)
    return primary


def compare(stages: Sequence[Stage], cfg: ReportConfig) -> Comparisons:
    """Compares the models and the methods. Raises UserError if there are no results of a requested model, rate,
    baseline, method or measure."""
    pair, rates = compared_models(stages, cfg), shared_rates(stages, cfg)
    records = make_records(stages, cfg, pair, rates)
    baseline = next(iter(records))
    method = cfg.method or baseline
    if method not in records:
        raise UserError(f"unknown method {method!r}, expected one of {', '.join(records)}")
    selected = with_choices_of(stages, {benchmark.name for benchmark in records[method].benchmarks})
    shown = [stage for stage in selected if not stage.number or stage.method_name == method]
    recorded = recorded_primary(cfg)
    study = Study(shown, *pair, named=recorded) if pair else None
    primary = primary_measure(cfg.primary, recorded, study.measures if study else make_measures(selected))
    planes = method_studies(selected, baseline, primary, recorded)
    return Comparisons(records, rates, method, study, planes, primary, recorded)


def source_notes(stages: Sequence[Stage], cfg: ReportConfig, recorded: str | None) -> list[str]:
    """Sentences on what the source of the results does not tell."""
    notes = []
    if str(cfg.results).endswith(".csv"):
        notes.append("a table of stages does not tell whether all runs were fine-tuned alike")
        notes += [] if recorded else [f"there is no {PRIMARY_FILE} next to the table, so that it is not known which "
                                      f"measure was named before the first run: the {PRIMARY} is called primary"]
    known = [len(losses.nll) > 1 for stage in stages for losses in stage.losses.values()]
    if any(known) and not all(known):
        notes.append(f"{ITEMS} has the items of {sum(known)} of the {len(known)} losses in the table: differences of "
                     "single runs that need those of others have no interval")
    estimates = [estimate for stage in stages for estimate in (*stage.benchmarks.values(), *stage.tasks.values())]
    if any(not estimate.parts for estimate in estimates):
        notes.append("some results have no single items of which they are the mean: their intervals of FG and over the "
                     "tasks take the values before and after, and those of both models, as independent, and are wider "
                     "than with them")
    return notes


def report_title(compared: Comparisons) -> str:
    """The title of a report."""
    record = compared.records[compared.method]
    title = f"Forgetting: {', '.join(record.chains)}; {record.stages[0]} to {record.stages[-1]}"
    return f"{title}; {with_method(compared.method)}" if len(compared.records) > 1 else title


def plot_figures(compared: Comparisons, out: Path) -> dict[str, str]:
    """Plots all figures. Returns {file name without suffix: caption}."""
    of_record = plot_record(compared.records[compared.method], out)  # first: it refuses damaged logs before it writes
    of_pairs = plot_pairs(compared.study, out, compared.primary) if compared.study else {}
    return of_pairs | of_record | plot_planes(compared.planes, out, compared.primary)


def write_report(out: Path, stages: Sequence[Stage], compared: Comparisons, sentences: Sequence[str],
                 sections: Sequence[Section]) -> None:
    """Writes the figures, the tables of stages and items, and the pages into a folder."""
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    figures = plot_figures(compared, out)
    images = "".join(markdown_image(name, caption) for name, caption in figures.items())
    body = "".join(f"## {name}\n\n{text}\n" for name, text in sections)
    write_text(out / "stages.csv", stage_table(stages))
    if items := item_table(stages):
        write_text(out / ITEMS, items)
    else:
        (out / ITEMS).unlink(missing_ok=True)  # that of an earlier report
    if compared.recorded:
        write_primary(out / PRIMARY_FILE, compared.recorded)
    else:
        (out / PRIMARY_FILE).unlink(missing_ok=True)
    write_pages(out, f"# {report_title(compared)}\n\n{markdown_list(sentences)}\n{images}{body}")


def main(cfg: ReportConfig) -> None:
    """Reads the results, compares the models and the methods, and writes the report."""
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another --out")
    stages, unusable = usable_stages(read_stages(cfg))
    compared, noise = compare(stages, cfg), noise_flags(stages)
    sentences, sections, missing = describe(compared, cfg.effect, noise)
    missing += [*unusable, *source_notes(stages, cfg, compared.recorded)]
    for name, lines in (("Metrics whose forgetting is noise", noise.values()), ("What is missing", missing)):
        sections += [(name, markdown_list(dict.fromkeys(lines)))] if lines else []
    sections += reproduction_sections(stages, cfg.runs) if cfg.runs else []
    write_report(out, stages, compared, sentences, sections)
    print(markdown_list(sentences) + f"report: {out / 'report.html'}")


if __name__ == "__main__":
    run((ReportConfig, main), __doc__)
