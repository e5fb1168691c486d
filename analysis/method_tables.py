"""Comparison of methods against forgetting: the same model and tasks, trained with each method."""
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

from analysis.comparison import CommonPart, same, training_minutes
from analysis.estimates import Estimate
from analysis.record import Record
from analysis.stages import Calibration, method_title
from analysis.tables import BIAS, PART, Section, format_estimate, table_of_values
from common.formatting import markdown_table

HIGHER_IS_BETTER = ("average performance", "backward transfer")  # of the other measures lower values are better

NOTE = ("FG in percent, positive is forgetting; measures over the tasks in points of the tasks' metrics; ECE (expected "
        "calibration error) and NLL (negative log-likelihood of the right option, in nats) are means over the "
        "benchmarks that all methods have after the last stage. In brackets 95% intervals: over the items, and over "
        "the pairs or the seeds of a single pair if there are several, not corrected for the number of measures.")

ONE_RUN = "one run of each method gives no verdict, since runs that differ only in their seed differ, too; "

PART_NOTE = ("\n(part): the method or the baseline lacks stages, benchmarks, test sets or seeds that the other has, "
             "see What is missing. The differences are without them.\n")

Gap = tuple[Estimate, bool]  # method minus baseline, whether one of them has more than was compared


def compare_methods(records: dict[str, Record], baseline: str, rates: Mapping[str, str],
                    matched: Collection[str]) -> tuple[list[str], list[Section], list[str]]:
    """The sentences and sections that compare methods with a baseline, and sentences on what was left out.

    records: {method: Record}. rates: {method: the learning rate of its record}. matched: the models whose methods are
    also compared at equal learning; they get no sentences here, since a method may forget less by learning less.
    """
    at_rates = ""
    if any(rates.values()):
        named = ", ".join(f"{method} {rates[method] or '(no folder of a rate)'}" for method in records)
        at_rates = f" Learning is not matched. The learning rates are: {named}."
    sentences: list[str] = []
    sections: list[Section] = []
    left_out: list[str] = []
    for model in records[baseline].chains:
        found = {method: record for method, record in records.items() if model in record.chains}
        names = list(dict.fromkeys(name for record in found.values() for name in record.measures()))
        gaps: dict[str, dict[str, Gap]] = {}
        of_model, runs = [], []
        for method in found:
            if method == baseline:
                continue
            common = CommonPart(found[method].chains[model], found[baseline].chains[model],
                                (f"{model}, {method}", f"{model}, {baseline}"))
            gaps[method] = measure_gaps(common, found[method], found[baseline], model)
            left_out += common.left_out
            runs.append(len(common.one))
            of_one_run = " in one run of each" if runs[-1] == 1 else ""
            of_model.append(f"{model}, {method_title(method)} compared with {method_title(baseline)}{of_one_run}: "
                            f"{describe_gaps(gaps[method], names)}.")
        if of_model and names and model not in matched:
            one_run = ONE_RUN if 1 in runs else ""
            sentences += [f"{model}: {one_run}intervals are not corrected for the number of measures.", *of_model]
        if values := value_table(found, model, names, gaps):
            sections.append((f"Methods: {model}", f"{NOTE}{at_rates}\n\n{values}"))
        rows = [[method, *(format_gap(gaps[method].get(name)) for name in names)] for method in found if method in gaps]
        if rows and names:
            sections.append((f"Methods minus {method_title(baseline)}: {model}",
                             with_note(markdown_table(["method", *names], rows))))
    return sentences, sections, left_out


def measure_gaps(common: CommonPart, record: Record, baseline: Record, model: str) -> dict[str, Gap]:
    """{measure: gap} of a model with a method and with the baseline, for the measures that both have."""
    gaps = {}
    for name, measure in baseline.measures().items():
        one, two, difference = common.compare(measure)
        if difference is not None:
            own = record.own_value(model, measure), baseline.own_value(model, measure)
            gaps[name] = difference, not (same(one, own[0]) and same(two, own[1]))
    return gaps


def with_note(table: str) -> str:
    """A table, and the meaning of "(part)" if it occurs."""
    return table + PART_NOTE * (PART in table)


def value_table(records: dict[str, Record], model: str, names: Sequence[str],
                gaps: Mapping[str, dict[str, Gap]]) -> str:
    """The table of the measures of a model with each method, of all that the method has; "" without values."""
    rows = []
    sampled = {method for method, record in records.items() if any(calibrations(record, model, "sampled"))}
    calibrated = common_names(records.values(), model, "calibration")
    for method, record in records.items():
        levels = {name: record.own_value(model, measure) for name, measure in record.measures().items()}
        is_part = {name: method in gaps and levels.get(name) is not None and gaps[method].get(name, (None, True))[1]
                   for name in names}
        rows.append([method, *(format_estimate(levels.get(name), 2) + PART * is_part[name] for name in names),
                     *calibration_cells(record, model, "calibration", calibrated),
                     "–" if math.isnan(minutes := training_minutes(list(record.own[model].values()), record.last))
                     else f"{minutes:.1f}"])
        if method in sampled:
            shared = common_names([records[name] for name in sampled], model, "sampled")
            rows.append(["averaged over posterior samples", *["–"] * len(names),
                         *calibration_cells(record, model, "sampled", shared), "–"])
    return with_note(table_of_values(["method", *names, "ECE", "NLL", "minutes of training"], rows))


def format_gap(gap: Gap | None) -> str:
    """A gap with its interval, marked if it is of a part."""
    return "–" if gap is None else format_estimate(gap[0], 2, sign="+") + PART * gap[1]


def describe_gaps(gaps: dict[str, Gap], names: Iterable[str]) -> str:
    """The measures by which a method is significantly better or worse than the baseline, and those that say nothing.

    A difference in the bias is neither better nor worse. names: of all measures.
    """
    groups: dict[str, list[str]] = {"better": [], "worse": [], "different": []}
    for name, gap in gaps.items():
        if gap[0].excludes_zero:
            better = (gap[0].value > 0) == (name in HIGHER_IS_BETTER)
            kind = "different" if name == f"FG {BIAS}" else "better" if better else "worse"
            groups[kind].append(f"{name} ({format_gap(gap)})")
    found = [f"{kind} by {', '.join(members)}" for kind, members in groups.items() if members]
    unknown = [name for name, (gap, _) in gaps.items() if math.isnan(gap.error)]
    if not found and len(unknown) < len(gaps):
        found.append("nothing can be told apart from noise")
    if unknown:
        found.append("without standard errors to judge by: " + ", ".join(unknown))
    if absent := [name for name in names if name not in gaps]:
        found.append("not compared, since they have no results in common: " + ", ".join(absent))
    return "; ".join(found)


def calibrations(record: Record, model: str, kind: str) -> list[dict[str, Calibration]]:
    """The calibrations after the last stage by benchmark, without parts, of each seed. kind: "calibration" or
    "sampled"."""
    counted = {benchmark.name for benchmark in record.benchmarks if not benchmark.part_of}
    return [{name: value for name, value in getattr(chain[record.last], kind).items() if name in counted}
            if record.last in chain else {} for chain in record.own[model].values()]


def common_names(records: Iterable[Record], model: str, kind: str) -> set[str]:
    """The benchmarks whose calibration all records and seeds have that have any."""
    found = [set(one) for record in records for one in calibrations(record, model, kind) if one]
    return set.intersection(*found) if found else set()


def calibration_cells(record: Record, model: str, kind: str, names: set[str]) -> list[str]:
    """Mean ECE and NLL over benchmarks and seeds after the last stage, as text."""
    found = [one[name] for one in calibrations(record, model, kind) for name in names & one.keys()]
    return [f"{statistics.fmean(values):.3f}" for values in zip(*((c.ece, c.nll) for c in found))] or ["–", "–"]
