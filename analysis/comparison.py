"""Selection of comparable results: those of the same stages and seeds, measured under the same conditions."""
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from analysis.estimates import Estimate, over_chains
from analysis.stages import BENCHMARKS, TASKS, Choices, ItemLosses, Stage
from common.files import UserError
from common.provenance import OPERATIONAL
from evaluation.conditions import Conditions, shown, unlike

Chain = dict[int, Stage]  # the stages of one model, method and seed, by number
Key = tuple[int, int]  # of a chain: (pretraining seed, 0 without a folder pair-<n>; fine-tuning seed)
Group = dict[Key, Chain]  # the chains of one model and method
Place = tuple[int, str, str]  # where a result belongs: (stage, BENCHMARKS or TASKS, name)

# Settings of fine-tuning: those that all methods share, and those that change no weights or identify a run.
OF_ALL_METHODS = {"num_train_epochs", "max_steps", "max_train_samples", "global_batch_size", "dtype", "template",
                  "train_on_source", "max_source_length", "max_target_length"}
NOT_COMPARED = OPERATIONAL | {"seed", "eval_steps", "max_eval_samples"}

Measure = Callable[[Sequence[Chain]], list[Estimate | None]]  # a value of each chain, over what all chains have


def chain_key(stage: Stage) -> Key:
    """The key of the chain that a stage belongs to."""
    return stage.pair or 0, stage.seed


def make_chains(stages: Iterable[Stage]) -> dict[str, Group]:
    """{model: {(pair, seed): Chain}} of stages. A seed without m0 takes that of the model of its pair; a seed with m0
    alone is left out if another one was trained. Raises UserError if a stage occurs twice."""
    groups: dict[str, Group] = {}
    for stage in stages:
        chain = groups.setdefault(stage.model, {}).setdefault(chain_key(stage), {})
        if stage.number in chain:
            raise UserError(f"there are two stages {stage.number} of {stage.model}: "
                            f"{chain[stage.number].directory or chain[stage.number].name} and "
                            f"{stage.directory or stage.name}. Name the folder of one experiment")
        chain[stage.number] = stage
    chains: dict[str, Group] = {}
    for model, group in groups.items():
        starts = {pair: {0: chain[0]} for (pair, _), chain in reversed(group.items()) if 0 in chain}
        trained = {pair for (pair, _), chain in group.items() if chain.keys() - {0}}
        chains[model] = {key: starts.get(key[0], {}) | chain for key, chain in group.items()
                         if chain.keys() - {0} or key[0] not in trained}
    return chains


def key_name(key: Key) -> str:
    """The display name of a chain."""
    return f"pair {key[0]}, seed {key[1]}" if key[0] else f"seed {key[1]}"


def stage_names(stages: Iterable[Stage]) -> list[str]:
    """The names of the stages 0 to the last. Raises UserError if chains are not of the same tasks in the same order."""
    by_number: dict[int, Stage] = {}
    for stage in stages:
        first = by_number.setdefault(stage.number, stage)
        if first.name != stage.name:
            raise UserError(f"stage {stage.number} is {first.name} of {first.model}, but {stage.name} of "
                            f"{stage.model}: compare chains of the same tasks in the same order")
    return [by_number[number].name if number in by_number else f"m{number}"
            for number in range(max(by_number, default=-1) + 1)]


def training_minutes(chains: Sequence[Chain], last: int) -> float:
    """The mean minutes of training of chains up to a stage; NaN if they are not known of all stages of all chains."""
    if not chains or not all(number in chain for chain in chains for number in range(1, last + 1)):
        return math.nan
    return math.fsum(chain[number].seconds for chain in chains for number in range(1, last + 1)) / len(chains) / 60


def places_of(chain: Chain) -> set[Place]:
    """The places at which a chain has results."""
    return {(number, kind, name) for number, stage in chain.items() for kind in (BENCHMARKS, TASKS)
            for name in getattr(stage, kind)}


def restrict(chain: Chain, places: set[Place]) -> Chain:
    """A chain without the results at other places."""
    def kept(number: int, kind: str, results: dict) -> dict:
        return {name: result for name, result in results.items() if (number, kind, name) in places}
    return {number: dataclasses.replace(stage, benchmarks=kept(number, BENCHMARKS, stage.benchmarks),
                                        tasks=kept(number, TASKS, stage.tasks),
                                        calibration=kept(number, BENCHMARKS, stage.calibration),
                                        sampled=kept(number, BENCHMARKS, stage.sampled))
            for number, stage in chain.items()}


def common_places(chains: Iterable[Chain]) -> set[Place]:
    """The places at which all chains have results."""
    places = list(map(places_of, chains))
    return set.intersection(*places) if places else set()


def drop_unlike(group: Group) -> tuple[Group, list[str]]:
    """Drops results measured under other conditions than the first stage that has them, m0 first. Returns the chains,
    and a sentence for each stage with dropped results, with both conditions."""
    first: dict[tuple[str, str], dict[str, tuple[object, str]]] = {}  # result -> {condition: (value, stage)}
    dropped: dict[tuple[str, str], dict[str, None]] = {}  # (stage, what differs) -> names of results
    places: dict[Key, set[Place]] = {key: places_of(chain) for key, chain in group.items()}
    for number, key in sorted((number, key) for key, chain in group.items() for number in chain):
        stage = group[key][number]
        for result, conditions in stage.conditions.items():
            reference = first.setdefault(result, {})
            if differing := unlike({name: value for name, (value, _) in reference.items()}, conditions):
                text = ", ".join(f"{name} {shown(conditions[name])} ({reference[name][1]}: "
                                 f"{shown(reference[name][0])})" for name in differing)
                dropped.setdefault((stage.name, text), {})[result[1]] = None
                places[key].discard((number, *result))
            else:
                first[result] = {name: (value, stage.name) for name, value in conditions.items()} | reference
    return ({key: restrict(chain, places[key]) for key, chain in group.items()},
            [f"{stage}: {', '.join(names)} under other conditions, not used: {text}"
             for (stage, text), names in dropped.items()])


def conditions_of(group: Group) -> dict[tuple[str, str], Conditions]:
    """The conditions of each result of chains from which unlike results have been dropped."""
    conditions: dict[tuple[str, str], Conditions] = {}
    for chain in group.values():
        for stage in chain.values():
            for (kind, name), of_stage in stage.conditions.items():
                if name in getattr(stage, kind):
                    conditions[kind, name] = of_stage | conditions.get((kind, name), {})
    return conditions


def without_pairs_behind(*groups: Group) -> tuple[Group, ...]:
    """Drops the pairs that are behind, from groups of the same chains: those with fewer stages of which all groups have
    results than another pair."""
    stages = {key: len(set.intersection(*({number for number, _, _ in places_of(group[key])} for group in groups)))
              for key in groups[0]}
    fewest = {pair: min(count for key, count in stages.items() if key[0] == pair) for pair, _ in stages}
    return tuple({key: chain for key, chain in group.items() if fewest[key[0]] == max(fewest.values())}
                 for group in groups)


class CommonPart:
    """The seeds and results shared by two groups of chains, of two models or methods. A result is shared if all chains
    have it, under the same conditions and after the same tasks.

    Attributes:
        one, two: the groups restricted to the shared seeds and results.
        left_out: sentences on seeds, conditions and tasks that differ.
    """

    def __init__(self, one: Group, two: Group, names: tuple[str, str]):
        """names: of the two groups, for the sentences."""
        shared = sorted(one.keys() & two.keys())
        one_shared, two_shared = without_pairs_behind(*({key: group[key] for key in shared} for group in (one, two)))
        keys = list(one_shared)
        self.left_out = [f"{names[0]} and {names[1]} are compared without the {key_name(key)}, which only one of them "
                         "has" for key in sorted(one.keys() ^ two.keys())]
        self.left_out += [f"{names[0]} and {names[1]} are compared without the {key_name(key)}, which lacks results of "
                          "a later stage" for key in shared if key not in keys]
        chains = [*one_shared.values(), *two_shared.values()]
        excluded, end = self._unlike_results(one, two, names), self._first_other_stage(one, two, names)
        places = {(number, kind, name) for number, kind, name in common_places(chains)
                  if number < end and (kind, name) not in excluded}
        self.one, self.two = ({key: restrict(group[key], places) for key in keys} for group in (one, two))

    def _unlike_results(self, one: Group, two: Group, names: tuple[str, str]) -> set[tuple[str, str]]:
        """The results whose conditions differ."""
        first, second, texts = conditions_of(one), conditions_of(two), {}
        for key in sorted(first.keys() & second.keys()):
            if differing := unlike(first[key], second[key]):
                texts[key] = ", ".join(f"{name} {shown(first[key][name])} and {shown(second[key][name])}"
                                       for name in differing)
        for text in dict.fromkeys(texts.values()):
            results = ", ".join(name for (_, name), other in texts.items() if other == text)
            self.left_out.append(f"{names[0]} and {names[1]} are compared without {results}: {text}")
        return set(texts)

    def _first_other_stage(self, one: Group, two: Group, names: tuple[str, str]) -> float:
        """The number of the first stage that differs; infinity if none does."""
        stages = [{number: stage.name for chain in group.values() for number, stage in chain.items()}
                  for group in (one, two)]
        others = [number for number in stages[0].keys() & stages[1].keys() if stages[0][number] != stages[1][number]]
        if others:
            first = min(others)
            self.left_out.append(f"{names[0]} and {names[1]} are compared up to stage {first - 1}: the next one is "
                                 f"{stages[0][first]} and {stages[1][first]}")
        return min(others, default=math.inf)

    def compare(self, measure: Measure) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
        """The values of a measure, and the difference within each pair and seed, each over pairs or seeds."""
        values = measure([*self.one.values(), *self.two.values()])
        one, two = values[:len(self.one)], values[len(self.one):]
        differences = (first - second if first and second else None for first, second in zip(one, two))
        grown, reference, difference = (over_chains(dict(zip(self.one, estimates)))
                                        for estimates in (one, two, differences))
        return grown, reference, difference


def same(one: Estimate | None, two: Estimate | None) -> bool:
    """Whether two estimates have the same value and error."""
    if one is None or two is None:
        return one is two
    return np.array_equal([one.value, one.error], [two.value, two.error], equal_nan=True)


def pair_name(pair: int, unit: str = "pair") -> str:
    """The display name of a pair. unit: "pair" of models, or "seed" of fine-tuning if seeds stand for pairs."""
    return f"{unit} {pair}" if pair or unit == "seed" else "the pair"


def title_of(stage: Stage, unit: str = "pair") -> str:
    """The display name of a stage. unit: see pair_name."""
    return ", ".join([*([pair_name(stage.pair, unit)] if stage.pair is not None else []), stage.model,
                      *([f"rate {stage.rate}"] if stage.rate else []), stage.name])


def chain_of(stage: Stage) -> tuple:
    """The identity of the chain of a stage; for m0, which all chains of a model share, that of its model."""
    return (stage.pair, stage.model, *((stage.method, stage.rate, stage.seed) if stage.number else ()))


def usable_stages(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages without those that drop_unevaluated and drop_wrong_parents drop, and their sentences."""
    evaluated, without_results = drop_unevaluated(stages)
    kept, wrong_parents = drop_wrong_parents(evaluated)
    return kept, wrong_parents + without_results


def drop_unevaluated(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages without the models that were not evaluated at all, and a sentence for each of these models."""
    evaluated = {(stage.pair, stage.model) for stage in stages if stage.benchmarks or stage.tasks or stage.losses}
    dropped = dict.fromkeys((stage.pair, stage.model) for stage in stages
                            if (stage.pair, stage.model) not in evaluated)
    return [stage for stage in stages if (stage.pair, stage.model) in evaluated], [
        f"{model}{'' if pair is None else f' of pair {pair}'} has no results" for pair, model in dropped]


def drop_wrong_parents(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """Drops stages whose recorded digest of m0 or of the parent differs from the checkpoint that precedes them in their
    chain. Returns the rest and a sentence for each dropped stage. Stages with unknown digests are kept."""
    made = {(*chain_of(stage), stage.number): losses.digests[0] for stage in stages for losses in stage.losses.values()}
    kept, sentences = [], []
    for stage in stages:
        m0 = made.get((stage.pair, stage.model, 0))
        before = made.get((*chain_of(stage), stage.number - 1)) if stage.number > 1 else m0
        start = stage.run.get("lineage", {}).get("start") or {}
        trained_from = [(start.get("digest"), m0), (stage.run.get("parent_digest"), before)]
        if stage.number and any(recorded and actual and recorded != actual for recorded, actual in trained_from):
            sentences.append(f"{stage.directory or stage.name} is not used: it was not trained from the checkpoint "
                             "that now lies before it in its chain")
        else:
            kept.append(stage)
    return kept, sentences


def drop_unlike_items(stages: Sequence[Stage], unit: str = "pair") -> tuple[list[Stage], list[str]]:
    """The stages without losses and answers under other conditions, or of other items, than those of the first stage
    that has them; and a sentence for each stage about what was dropped. unit: see pair_name."""
    first: dict[str, ItemLosses] = {}
    answered: dict[str, tuple[Stage, Choices]] = {}
    kept, sentences = [], []
    for stage in sorted(stages, key=lambda stage: (stage.number, stage.pair or 0)):
        texts = {}
        for name, losses in stage.losses.items():
            reference = first.setdefault(name, losses)
            names = unlike(reference.conditions, losses.conditions)
            if 1 in (len(reference.tokens), len(losses.tokens)):  # the items of one of them may not be known
                reference, losses = reference.total, losses.total
            if names or not np.array_equal(reference.tokens, losses.tokens):
                texts[f"losses of {name}"] = ", ".join(
                    f"{key} {shown(losses.conditions[key])} (elsewhere {shown(reference.conditions[key])})"
                    for key in names) or "other tokens"
        for name, choices in stage.choices.items():
            other, reference_choices = answered.setdefault(name, (stage, choices))
            names = unlike(other.conditions[BENCHMARKS, name], stage.conditions[BENCHMARKS, name])
            if names or len(choices.right) != len(reference_choices.right):
                texts[f"answers to {name}"] = ", ".join(names) or "other items"
        sentences += [f"{title_of(stage, unit)}: {what} under other conditions, not used: {text}"
                      for what, text in texts.items()]
        kept.append(dataclasses.replace(
            stage,
            losses={name: losses for name, losses in stage.losses.items() if f"losses of {name}" not in texts},
            choices={name: choices for name, choices in stage.choices.items() if f"answers to {name}" not in texts}))
    return kept, sentences


def trained_otherwise(stages: Sequence[Stage], of_methods: bool, unit: str = "pair") -> list[str]:
    """Sentences on the stages that were fine-tuned with other settings, or on other data, than the first stage of the
    same number. What is not known is taken as equal.

    of_methods: whether the stages are of several methods, which have different settings. unit: see pair_name.
    """
    first: dict[int, tuple[Stage, Conditions]] = {}
    titles: dict[tuple[str, str], list[str]] = {}  # (the first stage, what differs) -> the stages that differ
    for stage in stages:
        trained = {name: value for name, value in stage.run.get("settings", {}).items()
                   if (name in OF_ALL_METHODS if of_methods else name not in NOT_COMPARED)
                   and not (name == "learning_rate" and stage.rate)}  # which a folder tells
        trained |= {"data": stage.run["data_digest"]} if "data_digest" in stage.run else {}
        if stage.number and trained:
            other, reference = first.setdefault(stage.number, (stage, trained))
            if differing := unlike(reference, trained):
                text = ", ".join(f"{name} {shown(trained[name])} and {shown(reference[name])}" for name in differing)
                titles.setdefault((title_of(other, unit), text), []).append(title_of(stage, unit))
    return [f"{'; '.join(of_stages)}: not trained as {other}: {text}" for (other, text), of_stages in titles.items()]


def lacking_losses(stages: Sequence[Stage], unit: str = "pair") -> list[str]:
    """Sentences on the evaluated stages that lack losses, or divergences from m0, which another stage of the same
    number has. unit: see pair_name."""
    expected: dict[int, dict[str, None]] = {}
    for stage in stages:
        expected.setdefault(stage.number, {}).update(dict.fromkeys(measured_losses(stage)))
    return [f"{title_of(stage, unit)} lacks {', '.join(lacking)}, which other stages have" for stage in stages
            if stage.losses or stage.benchmarks or stage.tasks
            if (lacking := [name for name in expected[stage.number] if name not in measured_losses(stage)])]


def measured_losses(stage: Stage) -> list[str]:
    """The display names of the losses of a stage, and of the divergences from m0."""
    return [f"the {what} of {name}" for name, losses in stage.losses.items()
            for what in ("loss", "KL")[:1 if losses.kl is None else 2]]
