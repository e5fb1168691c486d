"""Runs a suite of benchmarks through lm-eval, and adds calibration to its results."""
import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import numpy as np
from lm_eval.api.task import ConfigurableTask

from common.files import digest, read_json
from common.provenance import git_commit
from evaluation.harness import HarnessModel
from evaluation.lm_eval_tasks import load_suite, task_manager
from evaluation.metrics import average_log_probs, calibration_metrics
from evaluation.parallel import ParallelModel
from evaluation.result_files import is_same_run, sample_files, write_results
from evaluation.suites import Benchmark
from model.checkpoint import checkpoint_digest
from model.parameter_files import POSTERIOR

Answers = dict[str, list[dict[str, Any]]]  # task -> its items with the model's answers, lm-eval's "samples"


def evaluate_suite(suite: list[Benchmark], model: ParallelModel, out: Path, run: dict[str, Any],
                   posterior_samples: int = 0, seed: int = 0) -> dict[str, Any]:
    """Runs a suite and writes the results to `out`, unless complete results of the same run exist.

    Returns the content of the results file: lm-eval's results with "run", "tokens" and "missing" added. Older results
    of the same benchmarks are removed.
    """
    source = model.tokenizer.directory
    run = run | {"lm_eval": version("lm_eval"), "suite": [
        dataclasses.asdict(benchmark) | {"file": benchmark.file and digest([benchmark.file])} for benchmark in suite]}
    if posterior_samples:
        run |= {"posterior_samples": posterior_samples, "seed": seed,
                "checkpoint_digest": checkpoint_digest(source, POSTERIOR)}
    for path in sorted(out.glob("results_*.json"), reverse=True):
        results = read_json(path)
        if is_same_run(results.get("run", {}), run) and not results["missing"]:
            print(f"{path} already exists, with the same model, data and settings", flush=True)
            return results
    samples = [(source, ("weights", seed, number)) for number in range(posterior_samples)]
    results, answers, missing = run_suite(suite, model, run["limit"], samples)
    results |= {"run": run | {"commit": git_commit()}, "tokens": model.counts, "missing": missing}
    if results["results"]:
        superseded = [path for path in out.glob("results_*.json")  # results of other programs have no "run"
                      if "run" in (old := read_json(path)) and old["results"].keys() & results["results"].keys()]
        write_results(out, results, answers)
        for path in superseded:
            for file in (path, *sample_files(path).values()):
                file.unlink()
    return results


def run_suite(suite: list[Benchmark], model: ParallelModel, limit: int | None = None,
              posterior_samples: Sequence[tuple[Path, tuple]] = ()) -> tuple[dict[str, Any], Answers, dict[str, str]]:
    """Runs all benchmarks of a suite, `limit` items of each task, in one call of lm-eval's `simple_evaluate`.

    Returns lm-eval's results with calibration added, the answers, and {name: reason} for benchmarks whose datasets are
    not available. For each posterior sample, (directory of the posterior, key of the sample), the multiple-choice
    benchmarks run again; accuracy and calibration of the averaged probabilities are added as "acc,sampled" and so on.
    The model keeps the weights of the last sample.
    """
    with quiet():
        loaded, missing = load_suite(suite)
        if not loaded:
            return {"results": {}}, {}, missing
        evaluate = functools.partial(lm_eval.simple_evaluate, HarnessModel(model), limit=limit,
                                     task_manager=task_manager())
        results = evaluate(tasks=[root for root, _ in loaded.values()])
        answers = results.pop("samples")
        multiple_choice = [root for root, tasks in loaded.values()
                           if all(task.OUTPUT_TYPE == "multiple_choice" for task in tasks)]
        sampled = []
        for directory, key in posterior_samples if multiple_choice else ():
            model.load_posterior_sample(directory, key)
            sampled.append(evaluate(tasks=multiple_choice)["samples"])
    for benchmark, (_, tasks) in loaded.items():
        for name, members in ({task.task_name: [task] for task in tasks} | {benchmark: tasks}).items():
            results["results"][name] |= calibration_results(members, answers, sampled)
    return results, answers, missing


def calibration_results(tasks: list[ConfigurableTask], answers: Answers, sampled: list[Answers]) -> dict[str, float]:
    """Calibration over the items of all `tasks`, under lm-eval's keys; empty if they are not multiple-choice.

    `sampled` holds the answers of each posterior sample; the probabilities are averaged over them.
    """
    if not (scores := option_scores(tasks, answers)):
        return {}
    results = {f"{key},none": value for key, value in calibration_metrics(*zip(*scores)).items()}
    if sampled_scores := list(filter(None, (option_scores(tasks, one) for one in sampled))):
        targets = [target for _, target in scores]
        averaged = [average_log_probs([options for options, _ in item]) for item in zip(*sampled_scores)]
        results["acc,sampled"] = float(np.mean([log_p.argmax() == target for log_p, target in zip(averaged, targets)]))
        results |= {f"{key},sampled": value for key, value in calibration_metrics(averaged, targets).items()}
    return results


def option_scores(tasks: list[ConfigurableTask], answers: Answers) -> list[tuple[list[float], int]]:
    """(log-likelihoods of the options, index of the right one) of each item of multiple-choice tasks.

    Other tasks are left out, and tasks with their own `process_results`, since several options may be right there; r@1
    is an exception. Items without a valid target are left out as well.
    """
    scores = []
    for task in tasks:
        if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results and "r@1" not in task.aggregation():
            continue
        for sample in answers.get(task.task_name, ()):
            choices = task.doc_to_choice(sample["doc"])
            target = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
            target = choices.index(target) if isinstance(target, str) and target in choices else target
            if isinstance(target, int) and 0 <= target < len(choices):
                scores.append(([score for score, _ in sample["filtered_resps"]][:len(choices)], target))
    return scores


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences messages of lm-eval and datasets, and shows their progress bars only on a terminal."""
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
