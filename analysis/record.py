"""The stages of an experiment in order: what is missing, and the measures of forgetting over them."""
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from analysis.benchmark_catalog import find_benchmarks
from analysis.comparison import (
    Chain,
    CommonPart,
    Group,
    Key,
    Measure,
    common_places,
    drop_unlike,
    key_name,
    make_chains,
    restrict,
    same,
    stage_names,
    without_pairs_behind,
)
from analysis.estimates import TASK_MEASURES, Estimate, Matrix, fg, mean, over_chains
from analysis.stages import BENCHMARKS, Stage
from common.files import UserError
from evaluation.suites import Benchmark

ComparedModels = tuple[str, str]  # the models to compare: (grown, reference)


@dataclass(frozen=True)
class Comparison:
    """The values of a measure by model, and of two models that are compared the difference (grown - reference).

    With a difference, the values of these two are those of what both have. Without one, because they have nothing in
    common or no two are compared, each value is of all that its model has.
    """
    values: dict[str, Estimate | None]
    difference: Estimate | None = None
    is_part: bool = False  # whether one of the two has more than was compared


class Record:
    """The stages of all models in order.

    Attributes:
        chains: {model: {(pair, seed): Chain}}. All seeds of a model of a pair share m0. Results under other conditions
            than those of m0 are left out.
        compared: the models to compare, if both have results.
        several_chains: whether a model has more than one chain.
        several_pairs: whether the models are those of more than one pair.
        rate: the learning rate of the stages; "" if they are in no folder of a rate, or not all in the same one.
        last: number of the last stage.
        stages: name of each stage.
        benchmarks: benchmarks that were measured, in the order of the suites.
        learned: task of each stage from the first on; "" if it is unknown.
        tasks: tasks with a test set, in the order in which they are learned.
        missing: a sentence for each stage or result that is missing or left out.
    """

    def __init__(self, stages: Sequence[Stage], categories: Sequence[str] = (), compared: ComparedModels | None = None,
                 last: int = 0, method: str = "", uncounted: Collection[str] = ()):
        """Finds what can be compared.

        Args:
            stages: of all models and seeds, with one method.
            categories: only these categories of benchmarks; empty: all.
            compared: the models to compare.
            last: number of the last stage, if these stages may lack it.
            method: its name, for the sentences in `missing`; empty if there is only one.
            uncounted: benchmarks that do not count in their categories.
        """
        groups = make_chains(stages)
        comparable = {model: drop_unlike(group) for model, group in groups.items()}
        self.chains = {model: group for model, (group, _) in comparable.items()}
        self.method, self.several_chains = method, max(map(len, self.chains.values())) > 1
        self.several_pairs = len({key[0] for _, key, _ in self.all_chains()}) > 1
        rates = {stage.rate or "" for stage in stages if stage.number}
        self.rate = rates.pop() if len(rates) == 1 else ""
        self._uncounted = uncounted
        self.last = max([last, *(number for _, _, chain in self.all_chains() for number in chain)])
        names = stage_names([stage for _, _, chain in self.all_chains() for stage in chain.values()])
        self.stages = [*names, *(f"m{number}" for number in range(len(names), self.last + 1))]
        self.benchmarks = find_benchmarks(stages)
        if unknown := sorted(set(categories) - set(self.categories)):
            raise UserError(f"unknown category {', '.join(unknown)}, expected some of {', '.join(self.categories)}")
        self.benchmarks = [b for b in self.benchmarks if not categories or b.category in categories]
        learned = {stage.number: stage.task for stage in stages if stage.task}
        self.learned = [learned.get(number, "") for number in range(1, self.last + 1)]
        tested = dict.fromkeys(task for stage in stages for task in stage.tasks)
        self.tasks = list(dict.fromkeys([*(task for task in self.learned if task in tested), *tested]))
        self.compared = compared if compared and set(compared) <= self.chains.keys() else None
        # each model's chains restricted to what all its seeds have, and those that are compared to what both have
        self.own = {model: common_group(group) for model, group in self.chains.items()}
        self.common = None if self.compared is None else CommonPart(
            self.chains[self.compared[0]], self.chains[self.compared[1]], self.compared)
        self.missing = [line for model, group in groups.items() for line in self._missing(model, group)]
        self.missing += [f"{self._title(model)}: {line}" for model, (_, lines) in comparable.items() for line in lines]
        self.missing += self.common.left_out if self.common else []

    def all_chains(self) -> Iterator[tuple[str, Key, Chain]]:
        """(model, (pair, seed), chain) of every chain."""
        return ((model, key, chain) for model, group in self.chains.items() for key, chain in group.items())

    def _title(self, model: str, number: int = 1, key: Key | None = None) -> str:
        """The display name of a chain; without the method for stage 0, which all methods share."""
        return ", ".join([model, *([self.method] if self.method and number else []),
                          *([] if key is None else [key_name(key)])])

    def _missing(self, model: str, group: Group) -> Iterator[str]:
        """Sentences on what the stages of a model lack."""
        for key, chain in group.items():
            for number, name in enumerate(self.stages):
                title = self._title(model, number, key if len(group) > 1 else None)
                if number not in chain:
                    yield f"{title}: the stage {name} is missing"
                    continue
                stage = chain[number]
                if stage.unused:
                    yield f"{title}: results of {name} that are not used: " + ", ".join(stage.unused)
                lacking = [b.name for b in self.benchmarks if b.name not in stage.benchmarks
                           and (not b.part_of or b.part_of in stage.benchmarks)]
                if lacking:
                    yield f"{title}: {name} lacks the benchmarks " + ", ".join(lacking)
                if lacking := [task for task in self.tasks if task not in stage.tasks]:
                    yield f"{title}: {name} lacks the test sets " + ", ".join(lacking)
            zero = [b.name for b in self.benchmarks if (start := benchmark_at(chain, 0, b.name)) and not start.value]
            if zero:
                yield f"{self._title(model, 0)}: no FG, since the value at the start is 0: " + ", ".join(zero)

    @property
    def at_rate(self) -> str:
        """The words that say at which learning rate the stages were trained; "" if `rate` is unknown."""
        return f" at the learning rate {self.rate}" if self.rate else ""

    @property
    def interval_text(self) -> str:
        """The sources of error in the 95% intervals."""
        spread = f" and the spread of the {'pairs' if self.several_pairs else 'seeds'}" if self.several_chains else ""
        return f"95% interval from the standard errors{spread}"

    def title(self, model: str) -> str:
        """The name of a model in heads and legends, with its number of pairs if there are several."""
        number = len({pair for pair, _ in self.own[model]})
        return f"{model}, {number} pair{'s' * (number != 1)}" if self.several_pairs else model

    @property
    def categories(self) -> list[str]:
        """The categories in the order of the suites."""
        return list(dict.fromkeys(benchmark.category for benchmark in self.benchmarks))

    def benchmarks_of(self, category: str, parts: bool = False) -> list[Benchmark]:
        """The benchmarks of a category that are not part of another; with `parts`, only those that are."""
        return [b for b in self.benchmarks if b.category == category and bool(b.part_of) == parts]

    def counted_in(self, category: str) -> list[str]:
        """The names of the benchmarks that count in a category."""
        return [b.name for b in self.benchmarks_of(category) if b.name not in self._uncounted]

    def benchmark_value(self, model: str, number: int, name: str) -> Estimate | None:
        """A benchmark at a stage, over pairs or seeds (`over_chains`). None if a chain lacks it."""
        return over_chains({key: benchmark_at(chain, number, name) for key, chain in self.own[model].items()})

    def version(self, model: str, name: str) -> str:
        """The version of lm-eval's task by which a benchmark of a model was measured; "" if it is unknown."""
        return next((str(version) for chain in self.chains[model].values() for stage in chain.values()
                     if (version := stage.conditions.get((BENCHMARKS, name), {}).get("version"))), "")

    def task_value(self, model: str, number: int, task: str) -> Estimate | None:
        """A task's metric at a stage, over pairs or seeds. None if a chain lacks it."""
        return over_chains({key: matrix_of(chain).get((number, task)) for key, chain in self.own[model].items()})

    def fg_measure(self, *names: str) -> Measure:
        """The measure of FG: in each chain the mean over benchmarks, since a seed affects them together."""
        return over_benchmarks(names, lambda chain, name: fg(benchmark_at(chain, 0, name), [
            benchmark_at(chain, number, name) for number in range(1, self.last + 1)]))

    def category_measure(self, category: str) -> Measure:
        """The measure of a category's FG."""
        return self.fg_measure(*self.counted_in(category))

    def task_measure(self, name: str) -> Measure:
        """One of TASK_MEASURES after the last stage, by name."""
        return lambda chains: [TASK_MEASURES[name](matrix_of(chain), self.last, self.learned) for chain in chains]

    def measures(self) -> dict[str, Measure]:
        """All measures for which the record has results, by name: FG of each category, and those over the tasks."""
        measures = {f"FG {category}": self.category_measure(category) for category in self.categories}
        has_tasks = self.tasks and any(self.learned)
        return measures | ({name: self.task_measure(name) for name in TASK_MEASURES} if has_tasks else {})

    def own_value(self, model: str, measure: Measure) -> Estimate | None:
        """A measure over all that a model has, over its pairs or seeds."""
        return over_chains(dict(zip(self.own[model], measure(list(self.own[model].values())))))

    def compare(self, measure: Measure) -> Comparison:
        """A measure of all models, and the difference of those that are compared."""
        values = {model: self.own_value(model, measure) for model in self.chains}
        if not (self.compared and self.common):
            return Comparison(values)
        grown, reference, difference = self.common.compare(measure)
        if difference is None:
            return Comparison(values)
        common: dict[str, Estimate | None] = dict(zip(self.compared, (grown, reference)))
        return Comparison(values | common, difference,
                          not all(same(values[model], common[model]) for model in self.compared))

    def category_fg(self, model: str, category: str) -> Estimate | None:
        """FG of a category, of what both models that are compared have. None if they have nothing in common."""
        comparison = self.compare(self.category_measure(category))
        both = self.compared or ()
        has_nothing_in_common = comparison.difference is None and all(comparison.values[name] for name in both)
        return None if model in both and has_nothing_in_common else comparison.values[model]


def over_benchmarks(names: Sequence[str], value_of: Callable[[Chain, str], Estimate | None]) -> Measure:
    """The measure that is the mean over the benchmarks that have a value in all chains."""
    def measure(chains: Sequence[Chain]) -> list[Estimate | None]:
        values = [[value_of(chain, name) for chain in chains] for name in names]
        defined = [estimates for estimates in values if None not in estimates]  # of the same benchmarks everywhere
        return [mean(estimates[index] for estimates in defined) for index in range(len(chains))]
    return measure


def common_group(group: Group) -> Group:
    """The chains restricted to the results that all of them have, without the pairs that are behind: those with results
    of fewer stages than another pair."""
    kept, = without_pairs_behind(group)
    places = common_places(kept.values())
    return {key: restrict(chain, places) for key, chain in kept.items()}


def records_by_method(stages: Sequence[Stage], categories: Sequence[str], baseline: str,
                      compared: ComparedModels | None = None, uncounted: Collection[str] = ()) -> dict[str, Record]:
    """{method: Record}, the baseline first. All methods start from the same m0. Stages without a method have the
    method "none". The first record has all models, those of the other methods have the models that were trained with
    them."""
    names = {stage.method_name for stage in stages if stage.number} or {"none"}
    methods = sorted(names, key=lambda name: (name != baseline, name))
    last, records = max(stage.number for stage in stages), {}
    for method in methods:
        trained = [stage for stage in stages if stage.number and stage.method_name == method]
        models = {stage.model for stage in (stages if method == methods[0] else trained)}
        starts = [stage for stage in stages if not stage.number and stage.model in models]
        title = method if len(methods) > 1 else ""
        records[method] = Record(starts + trained, categories, compared, last, title, uncounted)
        records[method].missing += [f"{model} has no runs with {method}" for model in records[methods[0]].chains
                                    if model not in models]
    return records


def benchmark_at(chain: Chain, number: int, name: str) -> Estimate | None:
    """A benchmark at a stage of a chain."""
    return chain[number].benchmarks.get(name) if number in chain else None


def matrix_of(chain: Chain) -> Matrix:
    """{(stage, task): Estimate} of a chain."""
    return {(number, task): estimate for number, stage in chain.items() for task, estimate in stage.tasks.items()}
