"""The size of a study: pairs, items and hours that a difference in forgetting takes, from the pairs of a pilot.

    python -m pipeline.experiment_plan --runs runs/study --effect 0.05
"""
import common.preamble

import math
from dataclasses import dataclass
from pathlib import Path

from analysis.comparison import usable_stages
from analysis.contrasts import Difference
from analysis.inference import ALPHA, POWER, VarianceComponents, units_needed
from analysis.left_out import unmatched
from analysis.measures import PRIMARY, check_measure, primary_file, read_primary
from analysis.pairs import Study
from analysis.results import read_runs
from common.configs import unknown_name
from common.files import UserError, walk
from common.provenance import RUN, read_record
from common.scripts import run
from common.settings import setting

ITEM_SHARE = 0.1  # of the variance between pairs that the items may add: more of them save few pairs


@dataclass(frozen=True)
class ExperimentPlanConfig:
    """Settings of the plan of a study."""
    runs: str = setting(None, "folder of a pilot's runs, with at least two pairs", required=True)
    effect: float = setting(0.05, "difference to be found, in units of the primary measure", at_least=1e-9)
    primary: str | None = setting(None, "the measure that answers the question; none: the one that experiment.py "
                                        f"recorded before the first run, or else {PRIMARY}")
    grown: str = setting("stack", "the model whose forgetting is compared")
    reference: str = setting("llm", "the model to compare it with")
    method: str = setting("", "only the stages with this method against forgetting; none: those without a method")


def training_seconds(folder: Path) -> float:
    """The seconds of training of all runs in a folder, by their run.json; epoch checkpoints do not count."""
    results = [read_record(root).get("result", {}) for root, _, names in walk(folder)
               if RUN in names and not root.name.startswith("checkpoint-")]
    return sum(result.get("seconds", 0.0) + result.get("seconds_after", 0.0) for result in results)


def items_needed(components: VarianceComponents) -> int | None:
    """The number of items whose choice is ITEM_SHARE of the variance between pairs; None if the pairs do not differ
    by more than their items."""
    if not components.of_pairs:
        return None
    return max(1, math.ceil(components.of_item * (1 - ITEM_SHARE) / ITEM_SHARE / components.of_pairs))


def pilot_difference(cfg: ExperimentPlanConfig) -> tuple[Difference, list[str]]:
    """The primary difference of the pilot, and sentences on the pairs that cannot be compared. Raises UserError if it
    has less than two pairs."""
    stages, _ = usable_stages(read_runs(cfg.runs))
    methods = list(dict.fromkeys(stage.method_name for stage in stages if stage.number))
    if len(methods) > 1 and not cfg.method:
        raise UserError(f"{cfg.runs} has stages of several methods, {', '.join(methods)}: give --method, one of them")
    models = list(dict.fromkeys(stage.model for stage in stages))
    if unknown := [*(unknown_name("method", cfg.method, methods) if cfg.method else []),
                   *(line for model in (cfg.grown, cfg.reference) for line in unknown_name("model", model, models))]:
        raise UserError(f"{cfg.runs}: {'; '.join(unknown)}")
    stages = [stage for stage in stages if not stage.number or cfg.method in ("", stage.method_name)]
    study = Study(stages, cfg.grown, cfg.reference)
    primary = cfg.primary or read_primary(primary_file(cfg.runs)) or PRIMARY
    check_measure(primary, study.measures)
    found = study.main_difference(primary)
    count, left_out = found.estimate.n if found else 0, list(unmatched(study, study.contrasts[0], study.last))
    if found is None or count < 2 or not found.estimate.sd:
        raise UserError(f"{cfg.runs} has {count} pairs with the {primary} of {cfg.grown} and {cfg.reference} after "
                        f"{study.stages[-1]}, expected at least 2 that differ: run experiment.py with more --pairs"
                        + "".join(f"; {line}" for line in left_out))
    return found, left_out


def print_plan(cfg: ExperimentPlanConfig) -> None:
    """Prints what the pilot found, and how many pairs, items and hours find the effect."""
    found, left_out = pilot_difference(cfg)
    estimate, unit = found.estimate, found.measure.unit
    used = {f"pair-{pair}" for pair in found.by_pair}
    hours = sum(training_seconds(root / name) for root, folders, _ in walk(cfg.runs) for name in folders
                if name in used) / 3600 / estimate.n
    low, high = estimate.interval
    print(f"pilot: {estimate.n} pairs, {found.measure.name} at {found.learning}, {found.contrast}: "
          f"{estimate.mean:+.4g} [{low:+.4g}, {high:+.4g}] {unit}\nstandard deviation between pairs: {estimate.sd:.4g}")
    if found.components:
        print_items(found.components, hours, cfg.effect)
    pairs = units_needed(estimate.sd, cfg.effect)
    low, high = (units_needed(sd, cfg.effect) for sd in estimate.sd_interval)
    print(f"pairs needed: {pairs:,} with the pilot's items, for a difference of {cfg.effect:g} {unit} with "
          f"{POWER:.0%} power at the level {ALPHA:g}; {low:,} to {high:,} over the 95% interval of "
          f"the standard deviation\nhours: {pairs * hours:.1f} of training, {hours:.2f} for each pair as in the pilot, "
          "with all runs of all its models and methods; evaluation comes on top")
    if left_out:
        print("note: the pairs and hours are those of pairs that can be compared: plan for more, since of the pilot "
              + "; ".join(left_out))


def print_items(components: VarianceComponents, hours: float, effect: float) -> None:
    """Prints the pairs and hours that find the effect with other numbers of items, and the items that are enough.

    hours: of training for each pair.
    """
    print(f"of its variance, {components.item_share:.0%} is due to the choice of {components.items} items (taken as "
          "independent; windows of one document are alike, so that for text it is more)\n\n"
          f"{'items':>10} {'deviation':>10} {'pairs':>7} {'hours':>9}")
    for factor in (0.5, 1, 2, 4, math.inf):
        items = factor * components.items
        deviation = components.deviation(items)
        pairs = units_needed(deviation, effect)
        name = "all" if math.isinf(items) else f"{items:.0f}"
        print(f"{name:>10} {deviation:>10.4g} {pairs:>7} {pairs * hours:>9.1f}")
    needed = items_needed(components)
    print(f"\nitems needed: {needed}, which are then {ITEM_SHARE:.0%} of the variance" if needed else
          "\nitems needed: more than the pilot's, whose pairs do not differ by more than their items")


if __name__ == "__main__":
    run((ExperimentPlanConfig, print_plan), __doc__)
