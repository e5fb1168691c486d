"""Benchmarks by lm-eval: suites of them, our model in lm-eval's terms, calibration beside its figures."""
import contextlib
import functools
import logging
import math
import warnings

import datasets
import huggingface_hub
import lm_eval
import numpy as np
from lm_eval.api.task import ConfigurableTask

from common.files import UserError, first_line
from evaluation.calibration import averaged, calibration
from evaluation.harness import HarnessModel
from evaluation.lm_eval_files import figure
from evaluation.lm_eval_tasks import check_tasks, leaves, local_task, task_manager

CALIBRATION = ("ece", "nll", "brier")  # as metrics.calibration names them


def run_suite(suite, scorer, limit=None, draws=()):
    """Runs the benchmarks of a suite in one call of lm-eval's `simple_evaluate`.

    draws: (directory, key) of draws of the weights from the posterior there. For each of them the multiple-choice
    benchmarks are run again, and accuracy and calibration by the probabilities averaged over the draws stand beside
    the other figures, as `acc,sampled` and so on. The model keeps the last draw.

    Returns its results, in its own layout with calibration added; {task: its items as lm-eval answered them}; and
    {name: reason} of benchmarks whose dataset could not be had. limit: items of each task. None in place of results
    where no benchmark could be run.
    """
    loaded, missing = {}, {}
    with quiet():
        for benchmark in suite:
            if benchmark.file:
                loaded[benchmark.name] = local_task(benchmark)
                continue
            try:
                loaded[benchmark.name] = task_manager().load(benchmark.name)
            except Exception as error:  # of datasets, of the Hub, of its HTTP library
                missing[benchmark.name] = first_line(error)
                if isinstance(error, ConnectionError):  # the others are in the cache or not: no more retries of 20 s
                    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
                continue
            for task in leaves(loaded[benchmark.name]):
                task.set_config(key="num_fewshot", value=benchmark.num_fewshot)
        if not loaded:
            return None, {}, missing
        check_tasks(suite, loaded)
        given = [built if isinstance(built, ConfigurableTask) else
                 next(iter((built["groups"] or built["tasks"]).values())) for built in loaded.values()]
        ask = functools.partial(lm_eval.simple_evaluate, HarnessModel(scorer), limit=limit, task_manager=task_manager())
        results = ask(tasks=given)
        samples = results.pop("samples")
        given = [task for task, built in zip(given, loaded.values())
                 if all(leaf.OUTPUT_TYPE == "multiple_choice" for leaf in leaves(built))]
        drawn = []
        for directory, key in draws if given else ():
            scorer.draw_weights(directory, key)
            drawn.append(ask(tasks=given)["samples"])
    for name, built in loaded.items():
        for title, tasks in ({task.task_name: [task] for task in leaves(built)} | {name: leaves(built)}).items():
            def scored(found, tasks=tasks):
                return [score for task in tasks for score in option_scores(task, found.get(task.task_name, ()))]
            if not (scores := scored(samples)):
                continue
            figures = {f"{key},none": value for key, value in calibration(*zip(*scores)).items()}
            if each := [answers for found in drawn if (answers := scored(found))]:
                right = [gold for _, gold in scores]
                mixed = [averaged([options for options, _ in answers]) for answers in zip(*each)]
                figures["acc,sampled"] = float(np.mean([log_p.argmax() == gold for log_p, gold in zip(mixed, right)]))
                figures |= {f"{key},sampled": value for key, value in calibration(mixed, right).items()}
            results["results"][title] |= figures
    return results, samples, missing


def option_scores(task, samples):
    """(log-likelihoods of the options, index of the right one) of a multiple-choice task's samples; none of others.

    A task that judges its options in a way of its own may have several right ones, but for those ranked by r@1.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results and "r@1" not in task.aggregation():
        return []
    found = []
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
        gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        if isinstance(gold, int) and 0 <= gold < len(choices):
            found.append(([score for score, _ in sample["filtered_resps"]][:len(choices)], gold))
    return found


@contextlib.contextmanager
def quiet():
    """lm-eval and datasets without their notes, and with progress bars as ours: on a terminal, while they run."""
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, desc="building requests", leave=False, disable=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            lm_eval.api.task.tqdm = bar


def figures(suite, results):
    """A dict for each benchmark that was run: its fields, `value`, `stderr`, `items`, calibration, and `sampled`:
    accuracy and calibration over draws of the weights, None where there were none."""
    def items(name):
        parts = results.get("group_subtasks", {}).get(name)
        return sum(map(items, parts)) if parts else results["n-samples"][name]["effective"]

    rows = []
    for benchmark in (benchmark for benchmark in suite if benchmark.name in results["results"]):
        found = results["results"][benchmark.name]
        value, error = figure(found, benchmark.metric)
        if value is None:
            names = [key.removesuffix(",none") for key, value in found.items() if isinstance(value, float)]
            raise UserError(f"{benchmark.name} has no metric {benchmark.metric!r}; it has {', '.join(names)}")
        rows.append({"name": benchmark.name, "label": benchmark.label or benchmark.name, "category": benchmark.category,
                     "part_of": benchmark.part_of, "metric": benchmark.metric, "num_fewshot": benchmark.num_fewshot,
                     "value": value, "stderr": None if math.isnan(error) else error,
                     "items": items(benchmark.name)} | {name: found.get(f"{name},none") for name in CALIBRATION}
                    | {"sampled": {name: found[f"{name},sampled"] for name in ("acc", *CALIBRATION)}
                       if "acc,sampled" in found else None})
    return rows
