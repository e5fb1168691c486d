"""The report: does the grown model forget less? Tables and figures from a folder of evaluated runs.

    python report.py --runs runs/tiny --out report                   stages made by this program
    python report.py --results some/folder --out report              <model>/<stage>/**/results_*.json of any lm-eval
    python report.py --results map.toml --out report                 a list of [[result]]: model, stage, file

Writes report.md, report.html (one file, with the figures in it) and the figures as PNG and SVG.
"""
import common.interrupts

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.method_tables import compare_methods
from analysis.pages import markdown_list, write_pages
from analysis.record import Pair, records_by_method
from analysis.record_figures import plot_record
from analysis.results import Stage, read_results, read_runs
from analysis.tables import reproduction_sections, result_tables
from common.files import UserError, explain_os_errors
from common.settings import run, setting


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report."""
    runs: str | None = setting(None, "folder of runs, such as runs/tiny")
    results: str | None = setting(None, "instead of runs: folder of lm-eval results, or a .toml file that lists them")
    out: str = setting("report", "folder to write the report into")
    grown: str = setting("stack", "the model whose forgetting is compared")
    reference: str = setting("llm", "the model to compare it with")
    method: str | None = setting(None, "the method whose stages are shown and models compared; none: baseline")
    baseline: str = setting("finetune", "the method to compare the other methods with")
    categories: tuple[str, ...] = setting((), "only these categories; none: all categories in the results")

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        return [] if (self.runs is None) != (self.results is None) else ["give either --runs or --results"]


def pair_of(stages: Sequence[Stage], cfg: ReportConfig) -> Pair | None:
    """The two models to compare. None if the defaults are missing. Raises UserError if requested models are."""
    models, defaults = list(dict.fromkeys(stage.model for stage in stages)), ReportConfig()
    missing = [name for name in (cfg.grown, cfg.reference) if name not in models]
    if missing and (cfg.grown, cfg.reference) != (defaults.grown, defaults.reference):
        raise UserError(f"unknown model {', '.join(missing)}, expected some of {', '.join(models)}")
    return None if missing else (cfg.grown, cfg.reference)


def main(cfg: ReportConfig) -> None:
    """Reads the results, compares the models and the methods, and writes the report."""
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another --out")
    stages = read_runs(cfg.runs) if cfg.runs else read_results(str(cfg.results))
    records = records_by_method(stages, cfg.categories, cfg.baseline, pair_of(stages, cfg))
    baseline = cfg.baseline if cfg.baseline in records else next(iter(records))
    method = baseline if cfg.method is None else cfg.method
    if method not in records:
        raise UserError(f"unknown method {method!r}, expected one of {', '.join(records)}")
    record = records[method]
    sentences, sections = result_tables(record)
    title = f"Forgetting of {' and '.join(record.chains)} over {len(record.stages)} stages"
    if not record.pair:
        hint = ": give --grown and --reference to compare two" if len(record.chains) > 1 else ""
        sentences.insert(0, f"The models are {', '.join(record.chains)}{hint}.")
    missing = [line for one in records.values() for line in one.missing]
    if len(records) > 1:
        method_sentences, method_sections, left_out = compare_methods(records, baseline)
        sentences, sections, missing = sentences + method_sentences, method_sections + sections, missing + left_out
        title += f" with the method {method}"
    if missing:
        sections.append(("What is missing", markdown_list(dict.fromkeys(missing))))
    if cfg.runs:
        sections += reproduction_sections(record, cfg.runs)
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    summary = markdown_list(sentences)
    images = "".join(f"![{caption}]({name}.png)\n\n" for name, caption in plot_record(record, out).items())
    body = "".join(f"## {name}\n\n{text}\n" for name, text in sections)
    write_pages(out, f"# {title}\n\n{summary}\n{images}{body}")
    print(summary + f"report: {out / 'report.html'}")


if __name__ == "__main__":
    run((ReportConfig, main), __doc__)
