"""Comparison of methods against forgetting: the same model and tasks, trained with each method."""
import math
import statistics

from analysis.record import Record
from analysis.statistics import TASK_MEASURES, Estimate
from analysis.tables import BIAS, Section, difference, format_estimate
from common.formatting import markdown_table

HIGHER_IS_BETTER = ("average performance", "backward transfer")  # of the other measures lower values are better

NOTE = ("FG in percent, positive is forgetting; measures over the tasks in points of the tasks' metrics; ECE and NLL "
        "(nats) are means over the benchmarks after the last stage. In brackets 95% intervals.\n\n")


def compare_methods(records: dict[str, Record], baseline: str) -> tuple[list[str], list[Section]]:
    """The sentences and sections that compare methods with a baseline. records: {method: Record}."""
    sentences: list[str] = []
    sections: list[Section] = []
    for model in records[baseline].chains:
        measured = {method: method_measures(record, model) for method, record in records.items()
                    if model in record.chains}
        names = list(dict.fromkeys(name for measures in measured.values() for name in measures))
        level_rows, gap_rows = [], []
        for method, measures in measured.items():
            record = records[method]
            level_rows.append([method, *(format_estimate(measures.get(name), "{:z.2f}") for name in names),
                               *calibration_cells(record, model), training_minutes(record, model)])
            sampled = calibration_cells(record, model, "sampled")
            if sampled != ["–", "–"]:
                level_rows.append(["averaged over posterior samples", *["–"] * len(names), *sampled, "–"])
            if method == baseline:
                continue
            gaps = {name: difference(measures.get(name), measured[baseline].get(name)) for name in names
                    if comparable(record, records[baseline], model, name)}
            gap_rows.append([method, *(format_estimate(gaps.get(name), "{:+z.2f}") for name in names)])
            sentences.append(f"{model}, {method} compared with {baseline}: {describe_gaps(gaps)}.")
        sections.append((f"Methods: {model}", NOTE + markdown_table(
            ["method", *names, "ECE", "NLL", "minutes of training"], level_rows)))
        if gap_rows:
            sections.append((f"Methods minus {baseline}: {model}", markdown_table(["method", *names], gap_rows)))
    return sentences, sections


def method_measures(record: Record, model: str) -> dict[str, Estimate]:
    """{measure: Estimate} of a model with one method, without the measures that are unknown."""
    found = {f"FG {category}": record.category_fg(model, category) for category in record.categories}
    if record.tasks and any(record.learned):
        found |= {name: record.task_measure(model, name) for name in TASK_MEASURES}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def comparable(one: Record, two: Record, model: str, name: str) -> bool:
    """Whether a measure has the same stages, benchmarks, tasks and seeds in both records."""
    if (one.stages, one.chains[model].keys()) != (two.stages, two.chains[model].keys()):
        return False
    if name in TASK_MEASURES:
        return one.measured_tasks(model) == two.measured_tasks(model)
    category = name.removeprefix("FG ")
    return one.measured(model, category) == two.measured(model, category)


def describe_gaps(gaps: dict[str, Estimate | None]) -> str:
    """The measures by which a method is significantly better or worse than the baseline, as text.

    gaps: {measure: method minus baseline}. A difference in the bias is neither better nor worse.
    """
    known = {name: gap for name, gap in gaps.items() if gap is not None and not math.isnan(gap.error)}
    if not known:
        return "not compared, they do not have the same stages or measures"
    groups: dict[str, list[str]] = {"better": [], "worse": [], "different": []}
    for name, gap in known.items():
        if gap.interval[0] > 0 or gap.interval[1] < 0:
            better = (gap.value > 0) == (name in HIGHER_IS_BETTER)
            kind = "different" if name == f"FG {BIAS}" else "better" if better else "worse"
            groups[kind].append(f"{name} ({format_estimate(gap, '{:+z.2f}')})")
    return "; ".join(f"{kind} by {', '.join(names)}" for kind, names in groups.items() if names) or \
        "nothing can be told apart from noise"


def calibration_cells(record: Record, model: str, kind: str = "calibration") -> list[str]:
    """Mean ECE and NLL over benchmarks and seeds after the last stage, as text. kind: "calibration" or "sampled"."""
    counted = {benchmark.name for benchmark in record.benchmarks if not benchmark.part_of}
    found = [calibration for chain in record.chains[model].values() if record.last in chain
             for name, calibration in getattr(chain[record.last], kind).items() if name in counted]
    return [f"{statistics.fmean(values):.3f}" for values in zip(*((c.ece, c.nll) for c in found))] or ["–", "–"]


def training_minutes(record: Record, model: str) -> str:
    """Minutes of training of all stages, mean over the seeds, as text."""
    seconds = [sum(stage.run.get("result", {}).get(key, 0.0) for stage in chain.values() if stage.number
                   for key in ("seconds", "seconds_after")) for chain in record.chains[model].values()]
    return f"{statistics.fmean(seconds) / 60:.1f}"
