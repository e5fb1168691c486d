"""Methods against forgetting beside one another: the same model and the same tasks, with each method."""
import statistics

from metrics import average_performance, backward_transfer, forgetting_from_best
from tables import difference, show, table

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
                         + table(["method", *measures, "ECE", "NLL", "minutes of training"], rows)))
        rows, reference = [], values(records[baseline], model, exact_start=True)
        for method in (method for method in there if method != baseline):
            measured = values(there[method], model, exact_start=True)
            gaps = {name: difference(measured.get(name), reference.get(name)) for name in measures}
            rows.append([method, *(show(gaps[name], "{:+z.2f}") for name in measures)])
            sentences.append(sentence(model, method, baseline, gaps))
        sections.append((f"Methods less {baseline}: {model}", table(["method", *measures], rows)))
    return sentences, sections


def values(record, model, exact_start=False):
    """{measure: Estimate} of a model with one method; those that cannot be had are left out. exact_start: for
    differences between methods, which start from the same weights."""
    found = {f"FG {category}": record.category_fg(model, category, exact_start) for category in record.categories}
    if record.tasks and any(record.learned):
        found |= {name: record.over(model, lambda chain, function=function: function(
            record.matrix(chain), record.last, record.learned)) for name, function in OVER_TASKS.items()}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def sentence(model, method, baseline, gaps):
    """What can be said of a method beside the baseline: by which measures it is better or worse beyond noise."""
    sides = {"better": [], "worse": []}
    for name, gap in gaps.items():
        if gap is None or not (gap.interval[0] > 0 or gap.interval[1] < 0):  # also where there is no standard error
            continue
        better = gap.value * BETTER.get(name, -1) > 0
        sides["better" if better else "worse"].append(f"{name} ({show(gap, '{:+z.2f}')})")
    said = [f"{side} by {', '.join(names)}" for side, names in sides.items() if names]
    return f"{model}, {method} beside {baseline}: " + ("; ".join(said) or "nothing can be told apart from noise") + "."


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
