"""The stages of an experiment in order: what is missing, and the measures of forgetting over them."""
from collections.abc import Callable, Iterable, Iterator, Sequence

from analysis.results import METRICS, Stage, shipped_benchmarks
from analysis.statistics import TASK_MEASURES, Estimate, Matrix, fg, mean, over_seeds
from common.files import UserError
from common.settings import read_config
from evaluation.suites import Benchmark

Chain = dict[int, Stage]  # the stages of one model and seed, by number


class Record:
    """The stages of all models in order.

    Attributes:
        chains: {model: {seed: Chain}}. All seeds of a model share m0.
        several_seeds: whether a model has more than one.
        last: number of the last stage.
        stages: name of each stage.
        benchmarks: benchmarks that were measured, in the order of the suites.
        learned: task of each stage from the first on; "" if it is unknown.
        tasks: tasks with a test set, in the order in which they are learned.
        missing: a sentence for each missing stage or result.
    """

    def __init__(self, stages: Sequence[Stage], categories: Sequence[str] = ()):
        """categories: only these categories of benchmarks; empty: all."""
        self.chains = make_chains(stages)
        self.several_seeds = max(map(len, self.chains.values())) > 1
        self.last = max(number for _, _, chain in self.all_chains() for number in chain)
        self.stages = self._stage_names()
        described = {name: benchmark for stage in stages for name, benchmark in stage.described.items()}
        known = described | shipped_benchmarks() | described  # the described ones come first and have precedence
        measured = dict.fromkeys(name for stage in stages for name in stage.benchmarks)
        self.benchmarks = [known[name] for name in known if name in measured]
        self.benchmarks += [Benchmark(name, "other") for name in measured if name not in known]
        if unknown := sorted(set(categories) - set(self.categories)):
            raise UserError(f"unknown category {', '.join(unknown)}, expected some of {', '.join(self.categories)}")
        self.benchmarks = [b for b in self.benchmarks if not categories or b.category in categories]
        learned = {stage.number: stage.task for stage in stages if stage.task}
        self.learned = [learned.get(number, "") for number in range(1, self.last + 1)]
        tested = dict.fromkeys(task for stage in stages for task in stage.tasks)
        self.tasks = list(dict.fromkeys([*(task for task in self.learned if task in tested), *tested]))
        self.missing = list(self._missing())

    def all_chains(self) -> Iterator[tuple[str, int, Chain]]:
        """(model, seed, chain) of every chain."""
        return ((model, seed, chain) for model, seeds in self.chains.items() for seed, chain in seeds.items())

    def _stage_names(self) -> list[str]:
        stages: dict[int, Stage] = {}
        for stage in (stage for _, _, chain in self.all_chains() for stage in chain.values()):
            first = stages.setdefault(stage.number, stage)
            if first.name != stage.name:
                raise UserError(f"stage {stage.number} is {first.name} of {first.model}, but {stage.name} of "
                                f"{stage.model}: compare models that learned the same tasks in the same order")
        return [stages[number].name if number in stages else f"m{number}" for number in range(self.last + 1)]

    def _missing(self) -> Iterator[str]:
        for model, seed, chain in self.all_chains():
            title = f"{model}, seed {seed}" if len(self.chains[model]) > 1 else model
            for number, name in enumerate(self.stages):
                if number not in chain:
                    yield f"{title}: the stage {name} is missing"
                    continue
                stage = chain[number]
                if stage.ignored:
                    yield (f"{title}: {name} has results without one of {', '.join(METRICS)}: "
                           + ", ".join(stage.ignored))
                lacking = [b.name for b in self.benchmarks if not b.part_of and b.name not in stage.benchmarks]
                if lacking:
                    yield f"{title}: {name} lacks the benchmarks " + ", ".join(lacking)
                if lacking := [task for task in self.tasks if task not in stage.tasks]:
                    yield f"{title}: {name} lacks the test sets " + ", ".join(lacking)

    @property
    def categories(self) -> list[str]:
        """The categories in the order of the suites."""
        return list(dict.fromkeys(benchmark.category for benchmark in self.benchmarks))

    def benchmarks_of(self, category: str, parts: bool = False) -> list[Benchmark]:
        """The benchmarks that count in a category, or with `parts` those that are parts of others."""
        return [b for b in self.benchmarks if b.category == category and bool(b.part_of) == parts]

    def combine_seeds(self, model: str, function: Callable[[Chain], Estimate | None]) -> Estimate | None:
        """A function of a chain as one estimate over a model's seeds. None if it is None for all of them."""
        return over_seeds(map(function, self.chains[model].values()))

    def benchmark_value(self, model: str, number: int, name: str) -> Estimate | None:
        """A benchmark at a stage."""
        return self.combine_seeds(model, lambda chain: benchmark_at(chain, number, name))

    def task_value(self, model: str, number: int, task: str) -> Estimate | None:
        """A task's metric at a stage."""
        return self.combine_seeds(model, lambda chain: matrix_of(chain).get((number, task)))

    def benchmark_fg(self, model: str, *names: str) -> Estimate | None:
        """FG of a benchmark. With several: in each chain the mean over them, since a seed affects them together."""
        stages = range(1, self.last + 1)
        return self.combine_seeds(model, lambda chain: mean(
            fg(benchmark_at(chain, 0, name), [benchmark_at(chain, number, name) for number in stages])
            for name in names))

    def category_fg(self, model: str, category: str) -> Estimate | None:
        """FG of a category."""
        return self.benchmark_fg(model, *(benchmark.name for benchmark in self.benchmarks_of(category)))

    def task_measure(self, model: str, name: str) -> Estimate | None:
        """One of TASK_MEASURES after the last stage, by name."""
        return self.combine_seeds(model, lambda chain: TASK_MEASURES[name](matrix_of(chain), self.last, self.learned))

    def measured(self, model: str, category: str) -> set[tuple[int, str]]:
        """The pairs (stage, benchmark) of a category that all chains of a model have: its FG rests on them."""
        return {(number, b.name) for number in range(self.last + 1) for b in self.benchmarks_of(category)
                if all(benchmark_at(chain, number, b.name) for chain in self.chains[model].values())}

    def measured_tasks(self, model: str) -> dict[int, set[tuple[int, str]]]:
        """The pairs (stage, task) that each seed's chain of a model has."""
        return {seed: set(matrix_of(chain)) for seed, chain in self.chains[model].items()}


def make_chains(stages: Iterable[Stage]) -> dict[str, dict[int, Chain]]:
    """{model: {seed: Chain}} of stages. A seed without m0 takes the model's; a seed with m0 alone is left out if
    another one was trained. Raises UserError if a stage occurs twice."""
    chains: dict[str, dict[int, Chain]] = {}
    for stage in stages:
        chain = chains.setdefault(stage.model, {}).setdefault(stage.seed, {})
        if stage.number in chain:
            raise UserError(f"there are two stages {stage.number} of {stage.model}: "
                            f"{chain[stage.number].directory or chain[stage.number].name} and "
                            f"{stage.directory or stage.name}. Name the folder of one experiment")
        chain[stage.number] = stage
    for model, seeds in chains.items():
        start = next(({0: chain[0]} for chain in seeds.values() if 0 in chain), {})
        trained = {seed: chain for seed, chain in seeds.items() if chain.keys() - {0}} or seeds
        chains[model] = {seed: start | chain for seed, chain in trained.items()}
    return chains


def records_by_method(stages: Sequence[Stage], categories: Sequence[str], baseline: str) -> dict[str, Record]:
    """{method: Record}, the baseline first. All methods start from the same m0. Stages without a method have the
    method "none"."""
    methods = {stage.method or "none" for stage in stages if stage.number} or {"none"}
    starts = [stage for stage in stages if not stage.number]
    return {method: Record(starts + [stage for stage in stages if stage.number and (stage.method or "none") == method],
                           categories) for method in sorted(methods, key=lambda name: (name != baseline, name))}


def benchmark_at(chain: Chain, number: int, name: str) -> Estimate | None:
    """A benchmark at a stage of a chain."""
    return chain[number].benchmarks.get(name) if number in chain else None


def matrix_of(chain: Chain) -> Matrix:
    """{(stage, task): Estimate} of a chain, each task by its own metric."""
    return {(number, task): metrics[task_metric(task)] for number, stage in chain.items()
            for task, metrics in stage.tasks.items() if task_metric(task) in metrics}


def task_metric(task: str) -> str:
    """The metric that a task is judged by."""
    return read_config("task", task).get("measure", "rougeL")
