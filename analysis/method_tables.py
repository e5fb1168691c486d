"""Methods against forgetting beside one another: the same model and the same tasks, with each method."""
import math
import statistics

from analysis.statistics import average_performance, backward_transfer, forgetting_from_best
from analysis.tables import BIAS, difference, show
from common.formatting import markdown_table

OVER_TASKS = {"average": average_performance, "backward transfer": backward_transfer,
              "forgetting from the best": forgetting_from_best}

BETTER = {"average": 1, "backward transfer": 1, "forgetting from the best": -1}  # the sign of a better value; FG: -1


def compare(records, baseline):
    """The sentences and sections on methods. records: {method: Record}; baseline: what the others are compared with."""
    sentences, sections = [], []
    for model in records[baseline].chains:
        there = {method: record for method, record in records.items() if model in record.chains}
        found = {method: values(record, model) for method, record in there.items()}
        measures = list(dict.fromkeys(name for measured in found.values() for name in measured))
        rows = [[method, *(show(measured.get(name), "{:z.2f}") for name in measures), *prices(there[method], model)]
                for method, measured in found.items()]
        rows = [line for row in rows for line in (row, *sampled_row(there[row[0]], model, len(measures)))]
        sections.append((f"Methods: {model}", "FG in percent, positive is forgetting; average, backward transfer and "
                         "forgetting from the best in points of the tasks' measures; ECE and NLL (nats) are means over "
                         "the benchmarks after the last stage. In brackets 95% intervals.\n\n"
                         + markdown_table(["method", *measures, "ECE", "NLL", "minutes of training"], rows)))
        rows = []
        for method in (method for method in there if method != baseline):
            gaps = {name: difference(found[method].get(name), found[baseline].get(name)) for name in measures
                    if comparable(there[method], records[baseline], model, name)}
            rows.append([method, *(show(gaps.get(name), "{:+z.2f}") for name in measures)])
            sentences.append(sentence(model, method, baseline, gaps))
        if rows:
            sections.append((f"Methods less {baseline}: {model}", markdown_table(["method", *measures], rows)))
    return sentences, sections


def values(record, model):
    """{measure: Estimate} of a model with one method; those that cannot be had are left out."""
    found = {f"FG {category}": record.category_fg(model, category) for category in record.categories}
    if record.tasks and any(record.learned):
        found |= {name: record.over(model, lambda chain, function=function: function(
            record.matrix(chain), record.last, record.learned)) for name, function in OVER_TASKS.items()}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def comparable(one, two, model, name):
    """Whether a measure rests on the same stages, benchmarks, tasks and seeds in both records."""
    if (one.stages, one.chains[model].keys()) != (two.stages, two.chains[model].keys()):
        return False
    if name in OVER_TASKS:
        return one.measured_tasks(model) == two.measured_tasks(model)
    category = name.removeprefix("FG ")
    return one.measured(model, category) == two.measured(model, category)


def sentence(model, method, baseline, gaps):
    """What can be said of a method beside the baseline: by which measures it is better or worse beyond noise. Of the
    bias neither direction is better."""
    known = {name: gap for name, gap in gaps.items() if gap is not None and not math.isnan(gap.error)}
    if not known:
        return f"{model}, {method} beside {baseline}: not compared, they do not have the same stages or measures."
    said = {"better": [], "worse": [], "different": []}
    for name, gap in known.items():
        if gap.interval[0] > 0 or gap.interval[1] < 0:
            kind = "better" if gap.value * BETTER.get(name, -1) > 0 else "worse"
            said["different" if name == f"FG {BIAS}" else kind].append(f"{name} ({show(gap, '{:+z.2f}')})")
    parts = [f"{kind} by {', '.join(names)}" for kind, names in said.items() if names]
    return f"{model}, {method} beside {baseline}: " + ("; ".join(parts) or "nothing can be told apart from noise") + "."


def prices(record, model, kind="calibration"):
    """Mean ECE and NLL over the benchmarks after the last stage, and minutes of training, over the seeds; as text."""
    counted = {benchmark.name for benchmark in record.benchmarks if not benchmark.part_of}
    chains = list(record.chains[model].values())
    last = [found for chain in chains if record.last in chain
            for name, found in getattr(chain[record.last], kind).items() if name in counted]
    seconds = [sum(stage.run.get("result", {}).get(key, 0.0) for stage in chain.values() if stage.number
                   for key in ("seconds", "seconds_after")) for chain in chains]
    errors = [f"{statistics.fmean(getattr(found, name) for found in last):.3f}" if last else "–"
              for name in ("ece", "nll")]
    return [*errors, f"{statistics.fmean(seconds) / 60:.1f}"]


def sampled_row(record, model, measures):
    """A row, if there is one, of calibration with the probabilities averaged over draws of the weights."""
    ece, nll, _ = prices(record, model, "sampled")
    return [] if ece == "–" else [["the same, over draws of the weights", *["–"] * measures, ece, nll, "–"]]
