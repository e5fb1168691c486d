"""The tables of a report, and its verdicts in words."""
import math

from analysis.record import measure
from analysis.statistics import average_performance, backward_transfer, forgetting_from_best
from common.formatting import markdown_table

BIAS = "Bias"  # the category whose parts are drawn as a heat map


def show(estimate, form="{:z.1f}"):
    """An estimate with its 95% interval, as text."""
    if estimate is None:
        return "–"
    text = form.format(estimate.value)
    if math.isnan(estimate.error):
        return text
    low, high = estimate.interval
    return f"{text} [{form.format(low)}, {form.format(high)}]"


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


def category_verdict(record, category, pair, found):
    """The sentence on a category's FG, which takes the same stages and benchmarks of both models."""
    title, (grown, reference) = f"FG, {category}", pair
    if record.measured(grown, category) != record.measured(reference, category):
        return f"{title}: not compared, the models do not have the same stages and benchmarks (see What is missing)."
    claim = {"claim": "the share of stereotypes fell {less} in {grown} than in {reference}"} if category == BIAS else {}
    return verdict(title, grown, reference, difference(found[grown], found[reference]), **claim)


def tables(record, pair):
    """The sentences of the summary, and the sections of tables, as (title, text in Markdown).

    pair: the two models to compare, [grown, reference], or an empty list.
    """
    models, sentences = list(record.chains), []
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
                         + markdown_table(["category", *models, *gap], rows)))
        rows = [row(b.label or b.name, {model: record.fg(model, b.name) for model in models})
                for b in record.benchmarks]
        sections.append(("Forgetting by benchmark", markdown_table(["benchmark", *models, *gap], rows)))
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
                         + markdown_table(["", *models, *gap], rows)))
        for model in models:
            rows = [[name, *(show(record.over(model, lambda chain, task=task, number=number:
                                              record.matrix(chain).get((number, task)))) for task in record.tasks)]
                    for number, name in enumerate(record.stages)]
            sections.append((f"Tasks by stage: {model}", markdown_table(["stage", *record.tasks], rows)))
    for model in models:
        rows = [[b.category, b.label or b.name, b.metric,
                 *(show(percent(record.value(model, number, b.name))) for number in range(record.last + 1))]
                for b in record.benchmarks]
        if rows:
            sections.append((f"Benchmarks by stage: {model}",
                             markdown_table(["category", "benchmark", "figure (%)", *record.stages], rows)))
    if record.missing:
        sections.append(("What is missing", "".join(f"- {line}\n" for line in record.missing)))
    return sentences, sections


def percent(estimate):
    """A share as a percentage."""
    return None if estimate is None else type(estimate)(100 * estimate.value, 100 * estimate.error)
