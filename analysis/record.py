"""The stages of an experiment in order: which there are, what they lack, and the measures of forgetting over them."""
from analysis.results import METRICS, shipped
from analysis.statistics import fg, mean, over_seeds
from common.files import UserError
from common.settings import read_config
from evaluation.suites import Benchmark


class Record:
    """The stages of all models in order, and what they lack.

    `chains` is {model: {seed: {number: Stage}}}; m0 is the same for all seeds of a model.
    """

    def __init__(self, stages, described, categories=()):
        self.chains, self.missing = {}, []
        for stage in stages:
            chain = self.chains.setdefault(stage.model, {}).setdefault(stage.seed, {})
            if stage.number in chain:
                raise UserError(f"there are two stages {stage.number} of {stage.model}: "
                                f"{chain[stage.number].directory or chain[stage.number].name} and "
                                f"{stage.directory or stage.name}. Name the folder of one experiment")
            chain[stage.number] = stage
        for model, seeds in self.chains.items():
            starts = [chain[0] for chain in seeds.values() if 0 in chain]
            trained = {seed: chain for seed, chain in seeds.items() if chain.keys() - {0}} or seeds
            for chain in trained.values():
                if 0 not in chain and starts:
                    chain[0] = starts[0]
            self.chains[model] = trained
        self.last = max(max(chain) for seeds in self.chains.values() for chain in seeds.values())
        names = {}
        for model, seeds in self.chains.items():
            for chain in seeds.values():
                for number, stage in chain.items():
                    first, name = names.setdefault(number, (model, stage.name))
                    if name != stage.name:
                        raise UserError(f"stage {number} is {name} of {first}, but {stage.name} of {model}: compare "
                                        "models that learned the same tasks in the same order")
        names = {number: name for number, (_, name) in names.items()}
        self.stages = [names.get(number, f"m{number}") for number in range(self.last + 1)]
        measured = dict.fromkeys(name for stage in stages for name in stage.benchmarks)
        known = described | {name: b for name, b in shipped().items() if name not in described}
        ordered = [known[name] for name in known if name in measured]
        self.benchmarks = ordered + [Benchmark(name, "other") for name in measured if name not in known]
        if unknown := sorted(set(categories) - set(self.categories)):
            raise UserError(f"unknown category {', '.join(unknown)}, expected some of {', '.join(self.categories)}")
        self.benchmarks = [b for b in self.benchmarks if not categories or b.category in categories]
        self.learned = [self.task_of(number) for number in range(1, self.last + 1)]
        there = dict.fromkeys(task for stage in stages for task in stage.tasks)
        self.tasks = [task for task in dict.fromkeys(self.learned) if task in there]
        self.tasks += [task for task in there if task not in self.tasks]
        self._find_missing()

    def task_of(self, number):
        """The task of a stage, by whichever model has it."""
        return next((chain[number].task for seeds in self.chains.values() for chain in seeds.values()
                     if number in chain and chain[number].task), None)

    def _find_missing(self):
        for model, seeds in self.chains.items():
            for seed, chain in seeds.items():
                who = f"{model}, seed {seed}" if len(seeds) > 1 else model
                for number, name in enumerate(self.stages):
                    if number not in chain:
                        self.missing.append(f"{who}: the stage {name} is missing")
                        continue
                    stage = chain[number]
                    if stage.ignored:
                        self.missing.append(f"{who}: {name} has results without one of {', '.join(METRICS)}: "
                                            + ", ".join(stage.ignored))
                    for what, wanted, there in (
                            ("benchmarks", [b.name for b in self.benchmarks if not b.part_of], stage.benchmarks),
                            ("test sets", self.tasks, stage.tasks)):
                        if lacking := [name for name in wanted if name not in there]:
                            self.missing.append(f"{who}: {name} lacks the {what} " + ", ".join(lacking))

    def over(self, model, function):
        """One estimate over the seeds of what a function makes of each chain; None where it is None for all."""
        found = [estimate for chain in self.chains[model].values() if (estimate := function(chain)) is not None]
        return over_seeds(found) if found else None

    def value(self, model, number, name):
        """A benchmark at a stage."""
        return self.over(model, lambda chain: chain[number].benchmarks.get(name) if number in chain else None)

    def fg_of(self, chain, name):
        """FG of a benchmark in one chain."""
        values = [chain[number].benchmarks.get(name) if number in chain else None for number in range(self.last + 1)]
        return fg(values[0], values[1:])

    def fg(self, model, name):
        """FG of a benchmark."""
        return self.over(model, lambda chain: self.fg_of(chain, name))

    def category_fg(self, model, category):
        """FG of a category: in each chain the mean over its benchmarks that have one, since a seed moves them all."""
        def of_chain(chain):
            found = [estimate for benchmark in self.of_category(category)
                     if (estimate := self.fg_of(chain, benchmark.name)) is not None]
            return mean(found) if found else None
        return self.over(model, of_chain)

    def measured(self, model, category):
        """What the FG of a category rests on: the pairs (stage, benchmark) that all chains of a model have."""
        names = {benchmark.name for benchmark in self.of_category(category)}
        return set.intersection(*({(number, name) for number, stage in chain.items() for name in names
                                   if name in stage.benchmarks} for chain in self.chains[model].values()))

    def measured_tasks(self, model):
        """The same for the tasks: what each seed's chain has, {seed: pairs (stage, task)}."""
        return {seed: set(self.matrix(chain)) for seed, chain in self.chains[model].items()}

    def of_category(self, category, parts=False):
        """The benchmarks of a category that count in it, or those that are parts of others."""
        return [b for b in self.benchmarks if b.category == category and bool(b.part_of) == parts]

    @property
    def categories(self):
        """The categories in the order of the suites."""
        return list(dict.fromkeys(benchmark.category for benchmark in self.benchmarks))

    def matrix(self, chain):
        """{(stage, task): Estimate} of a chain, each task by its own measure."""
        return {(number, task): measures[measure(task)] for number, stage in chain.items()
                for task, measures in stage.tasks.items() if measure(task) in measures}


def measure(task):
    """The metric by which a task is judged."""
    return read_config("task", task).get("measure", "rougeL")
