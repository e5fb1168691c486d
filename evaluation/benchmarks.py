"""Runs a suite of benchmarks through lm-eval, and adds calibration and the loss of the right options to its results."""
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from common.files import UserError, digest, first_line, parsing
from common.provenance import git_commit
from common.writing import write_json
from evaluation.harness import HarnessModel
from evaluation.lm_eval_tasks import Loaded, load_suite, quiet
from evaluation.metrics import average_log_probs, calibration_metrics, log_softmax
from evaluation.parallel import ParallelModel
from evaluation.result_files import (
    MISSING,
    ResultsFile,
    earlier_results,
    is_same_run,
    read_results_file,
    sample_files,
    write_results,
)
from evaluation.suites import Benchmark
from evaluation.summary import suite_table

Answers = dict[str, list[dict[str, Any]]]  # task -> its items with the model's answers, lm-eval's "samples"
PosteriorSample = tuple[Path, tuple]  # directory of the posterior, and the key of the sample


@dataclass(frozen=True)
class SuiteRun:
    """A suite, its results from earlier runs with the same inputs, and the loaded tasks of the other benchmarks."""
    suite: list[Benchmark]
    run: dict[str, Any]  # the record of what the results depend on
    posterior_samples: Sequence[PosteriorSample]
    existing: list[dict[str, Any]]  # contents of results files
    loaded: Loaded
    missing: dict[str, str]  # reasons by name, of benchmarks whose datasets are not available


def prepare_suite(suite: list[Benchmark], out: Path, run: dict[str, Any], max_length: int,
                  posterior_samples: Sequence[PosteriorSample] = ()) -> SuiteRun:
    """Loads the tasks of a suite that are missing in the results of the same run in `out`, for a model with a context
    of `max_length` tokens.

    Raises UserError for benchmarks that cannot be run, and for damaged results in `out`.
    """
    run = run | {"lm_eval": version("lm_eval"), "suite": [
        dataclasses.asdict(benchmark) | {"file": file_digest(benchmark)} for benchmark in suite]}
    existing: list[dict[str, Any]] = []
    measured: set[str] = set()
    files = own_results(out)
    newest = {name: file.path for file in files for name in file.results}
    for file in [file for file in files if is_same_run(file.run | {"suite": run["suite"]}, run)]:
        with earlier_results(), parsing(file.path, "a results file of evaluate.py"):
            known = {entry["name"]: value_settings(entry) for entry in file.suite}
            same = {entry["name"] for entry in run["suite"] if known.get(entry["name"]) == value_settings(entry)}
            if same := same & file.results.keys():
                # raises for damaged results
                suite_table([benchmark for benchmark in suite if benchmark.name in same], file.content)
                print(f"{file.path} already exists, with the same model, data and settings", flush=True)
                for other in sorted({newest[name] for name in same} - {file.path}):
                    print(f"{other} is newer and has other settings: reports use its results unless they are of fewer "
                          "items; delete it to use those of this run", flush=True)
                changed = {benchmark.name for benchmark in suite} - same
                existing.append(file.content | {"results": {
                    name: values for name, values in file.results.items() if name not in changed}})
                measured |= same
    with quiet():
        return SuiteRun(suite, run, posterior_samples, existing, *load_suite(
            [benchmark for benchmark in suite if benchmark.name not in measured], max_length))


def value_settings(entry: dict[str, Any]) -> dict[str, Any]:
    """The part of a suite entry in the record of a run that the benchmark's value depends on."""
    return json.loads(json.dumps({name: entry.get(name) for name in (
        "metric", "num_fewshot", "file", "pairs", "by", "where", "options")}))


def file_digest(benchmark: Benchmark) -> str | None:
    """The digest of a benchmark's local file. None for a task of lm-eval, and for a file that is still to be made."""
    return digest([benchmark.file]) if benchmark.file and Path(benchmark.file).is_file() else None


def own_results(out: Path) -> list[ResultsFile]:
    """The results files of evaluate.py in a folder, the oldest first. Raises UserError if one is damaged."""
    with earlier_results():
        files = [read_results_file(path) for path in sorted(out.glob("results_*.json")) if path.is_file()]
    return [file for file in files if file.run]


def evaluate_suite(prepared: SuiteRun, model: ParallelModel, out: Path) -> dict[str, Any]:
    """Runs the benchmarks of a suite that earlier runs have not measured, and writes their results to `out`.

    Returns the results of all: lm-eval's, with "run", "tokens" and "missing" added. Older results that the new ones
    supersede are removed. What is missing is recorded in `out`.
    """
    results, answers = run_suite(prepared.loaded, model, prepared.run["limit"], prepared.posterior_samples,
                                 prepared.run.get("template") == "chat")
    if results["results"]:
        results |= {"run": prepared.run | {"commit": git_commit()}, "tokens": model.counts}
        superseded = [file.path for file in own_results(out) if supersedes(results, file)]
        write_results(out, results, answers)
        for path in superseded:
            for file in (path, *sample_files(path).values()):
                file.unlink()
    record = out / MISSING
    record.unlink(missing_ok=True)
    if prepared.missing:
        write_json(record, {"missing": prepared.missing, "run": prepared.run})
    return merged([*prepared.existing, results]) | {"missing": prepared.missing}


def merged(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The contents of several results files as one: objects are united; of other values the last one is kept."""
    result: dict[str, Any] = {}
    for content in contents:
        for key, value in content.items():
            result[key] = {**result[key], **value} if key in result and isinstance(value, dict) else value
    return result


def supersedes(results: dict[str, Any], old: ResultsFile) -> bool:
    """Whether results hold every benchmark of an older file, with the same settings and dtype, and with at least as
    many items and posterior samples."""
    def settings(suite: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {entry["name"]: value_settings(entry) for entry in suite}

    def items(content: dict[str, Any]) -> dict[str, int]:
        return {name: sizes["effective"] for name, sizes in content["n-samples"].items()}

    with earlier_results(), parsing(old.path, "a results file of evaluate.py"):
        new_items = items(results)
        run, new, earlier = results["run"], settings(results["run"].get("suite", [])), settings(old.suite)
        return all(run.get(name) == old.run.get(name) for name in ("template", "dtype")) and \
            all(new.get(name) == earlier[name] for name in earlier if name in old.results) and \
            old.results.keys() <= results["results"].keys() and \
            all(new_items.get(name, 0) >= count for name, count in items(old.content).items()) and \
            run.get("posterior_samples", 0) >= old.run.get("posterior_samples", 0)


def run_suite(loaded: Loaded, model: ParallelModel, limit: int | None = None,
              posterior_samples: Sequence[PosteriorSample] = (), chat: bool = False) -> tuple[dict[str, Any], Answers]:
    """Runs all benchmarks of a suite, `limit` items of each task, in one call of lm-eval's `simple_evaluate`, with
    `chat` in the chat template of the tokenizer.

    Returns lm-eval's results with calibration and bits per byte added, and the answers with the loss of the right
    options added (see `add_option_losses`). For each posterior sample the multiple-choice benchmarks run again;
    accuracy and calibration of the averaged probabilities are added as "acc,sampled" and so on. The model keeps the
    weights of the last sample.
    """
    if not loaded:
        return {"results": {}}, {}
    results = simple_evaluate(model, [root for root, _ in loaded.values()], limit, chat)
    answers = results.pop("samples")
    multiple_choice = [root for root, tasks in loaded.values()
                       if all(map(has_right_option, tasks))]
    sampled = []
    for directory, key in posterior_samples if multiple_choice else ():
        model.load_posterior_sample(directory, key)
        sampled.append(simple_evaluate(model, multiple_choice, limit, chat)["samples"])
    for benchmark, (_, tasks) in loaded.items():
        add_option_losses(tasks, answers)
        for name, members in ({task.task_name: [task] for task in tasks} | {benchmark: tasks}).items():
            results["results"][name] |= option_results(members, answers, sampled)
    return results, answers


def simple_evaluate(model: ParallelModel, tasks: list, limit: int | None, chat: bool) -> dict[str, Any]:
    """lm-eval's function of that name. Raises UserError for what it cannot compute, such as an infinite perplexity."""
    try:
        with quiet():
            # `tasks` are loaded. The default manager would read the files of all lm-eval tasks, which takes seconds.
            return lm_eval.simple_evaluate(HarnessModel(model), tasks=tasks, limit=limit, apply_chat_template=chat,
                                           task_manager=TaskManager(include_defaults=False))
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"lm-eval cannot compute the results: {type(error).__name__}: {first_line(error)}") from error


def option_results(tasks: list[ConfigurableTask], answers: Answers, sampled: list[Answers]) -> dict[str, float]:
    """Chance level, calibration and mean bits per byte of the right options over the items of all `tasks`, under
    lm-eval's keys; empty if they are not multiple-choice.

    `sampled` holds the answers of each posterior sample; the probabilities are averaged over them.
    """
    options = [len(task.doc_to_choice(sample["doc"])) for task in tasks if task.OUTPUT_TYPE == "multiple_choice"
               for sample in answers.get(task.task_name, ())]
    results = {"chance,none": float(np.mean([1 / count for count in options]))} if options else {}
    if not (items := list(answered_items(tasks, answers))):
        return results
    scores = [(item.scores, item.target) for item in items]
    results |= {f"{key},none": value for key, value in calibration_metrics(*zip(*scores)).items()}
    if bits := [item.sample["bits_per_byte"] for item in items if "bits_per_byte" in item.sample]:
        results["bits_per_byte,none"] = float(np.mean(bits))
    if sampled_items := list(filter(None, (list(answered_items(tasks, one)) for one in sampled))):
        targets = [target for _, target in scores]
        averaged = [average_log_probs([answer.scores for answer in item]) for item in zip(*sampled_items)]
        results["acc,sampled"] = float(np.mean([log_p.argmax() == target for log_p, target in zip(averaged, targets)]))
        results |= {f"{key},sampled": value for key, value in calibration_metrics(averaged, targets).items()}
    return results


@dataclass(frozen=True)
class AnsweredItem:
    """The answer to an item of a multiple-choice task."""
    sample: dict[str, Any]  # lm-eval's record of the answer
    scores: list[float]  # log-likelihoods of the options
    target: int  # index of the right option
    option: str  # the text whose log-likelihood, given the context, is the score of the right option


def has_right_option(task: ConfigurableTask) -> bool:
    """Whether one option of each item is right. A multiple-choice task with its own `process_results` may have several
    right options; r@1 is an exception."""
    return task.OUTPUT_TYPE == "multiple_choice" and (not task.config.process_results or "r@1" in task.aggregation())


def answered_items(tasks: list[ConfigurableTask], answers: Answers) -> Iterator[AnsweredItem]:
    """Yields the answered items of the tasks that have a right option. Items without a valid target are left out."""
    for task in filter(has_right_option, tasks):
        for sample in answers.get(task.task_name, ()):
            doc = sample["doc"]
            choices = task.doc_to_choice(doc)
            target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            target = choices.index(target) if isinstance(target, str) and target in choices else target
            if isinstance(target, int) and 0 <= target < len(choices):
                # with several inputs the options are contexts, and all are followed by the same text
                option = task.doc_to_target(doc) if task.multiple_input else choices[target]
                yield AnsweredItem(sample, [score for score, _ in sample["filtered_resps"]][:len(choices)], target,
                                   option)


def add_option_losses(tasks: list[ConfigurableTask], answers: Answers) -> None:
    """Adds the loss of the right option to the answers of multiple-choice tasks (Heineman et al., arXiv 2508.13144).

    "nll" is its negative log-probability in nats, normalised over the options (their softmax). "bits_per_byte" is its
    negative log-likelihood in bits per UTF-8 byte of its text, and left out if the text is empty.
    """
    for item in answered_items(tasks, answers):
        item.sample["nll"] = float(-log_softmax(item.scores)[item.target])
        if size := len(item.option.encode()):
            item.sample["bits_per_byte"] = -item.scores[item.target] / math.log(2) / size
