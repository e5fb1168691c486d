"""Decoding of a task's test items, and the metrics of the generated texts."""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.configs import read_config
from common.files import UserError, parsing, read_json, read_json_lines
from common.provenance import DEFAULT_TEMPLATE, TemplateName, git_commit
from common.settings import Resolved
from corpus.prompts import open_template
from corpus.raw_tasks import restore_brackets
from evaluation.metrics import bertscore, bleu, bootstrap_interval, rouge, sanity_metrics, sari, sari_hf
from evaluation.parallel import ParallelModel
from evaluation.result_files import earlier_results, is_same_run, task_files, write_task_results
from evaluation.summary import task_table
from model.generation import GenerationConfig


@dataclass(frozen=True)
class TaskTestSet:
    """Test items of a task, and how they are evaluated."""
    task: str
    items: list[dict[str, Any]]
    data_digest: str
    decoding: GenerationConfig
    max_source_length: int  # tokens of a prompt
    source: str  # the field of src_info with the source text, for SARI and for the detection of copies
    sari: str | None  # the definition of SARI, or None for a task that is not judged by it
    bertscore_model: str | None
    bertscore_layer: int | None
    template: TemplateName = DEFAULT_TEMPLATE


def make_generation_config(options: dict[str, Any], where: str) -> GenerationConfig:
    """A GenerationConfig from settings by name. Raises UserError, which ends with `where`, for invalid ones."""
    resolved = Resolved(GenerationConfig)
    resolved.update({name: value for name, value in options.items() if name != "early_stopping"}, where)
    early_stopping = {name: value for name, value in options.items() if name == "early_stopping"}  # has two types
    config = GenerationConfig(**resolved.values, **early_stopping)
    if problems := resolved.problems + [f"{problem} (in {where})" for problem in config.problems()]:
        raise UserError("; ".join(problems))
    return config


def task_decoding(task: str, seed: int) -> GenerationConfig:
    """The decoding of a task, from the table [decoding] in its config file."""
    return make_generation_config(read_config("task", task)["decoding"] | {"seed": seed},
                                  f"configs/task/{task}.toml [decoding]")


def record(test_set: TaskTestSet, run: dict[str, Any]) -> dict[str, Any]:
    """The settings that determine a test set's results: `run`, extended by those of the test set."""
    facts = dataclasses.asdict(dataclasses.replace(test_set, items=[]))
    if not test_set.decoding.do_sample:
        facts["decoding"]["seed"] = None
    return run | {name: value for name, value in facts.items() if name not in ("task", "items")} | {
        "template": recorded_template(test_set.template)}


def recorded_template(template: TemplateName) -> TemplateName | None:
    """The template as results record it: None for the default, as in results from before there were others."""
    return None if template == DEFAULT_TEMPLATE else template


def existing_results(test_set: TaskTestSet, out: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The content of the metrics file in `out` if it has the results of the same run, else None.

    Raises UserError if it or the predictions are damaged, or if they are of more items, which would be lost.
    """
    metrics_file, predictions_file = task_files(out, test_set.task)
    if not metrics_file.exists():
        return None
    with earlier_results():
        existing = read_json(metrics_file, dict)
        with parsing(metrics_file, "a metrics file of evaluate.py"):
            task_table([existing])  # raises for damaged results
            if existing["samples"] > len(test_set.items):
                raise UserError(f"{metrics_file} has results of {existing['samples']} items, which would be replaced "
                                f"by those of {len(test_set.items)}")
            lines = read_json_lines(predictions_file) if predictions_file.exists() else []
            is_whole = len(lines) == existing["samples"]
            return existing if is_whole and is_same_run(existing["run"], record(test_set, run)) else None


def evaluate_test_set(test_set: TaskTestSet, model: ParallelModel, out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Decodes a test set and writes its predictions and metrics to `out`, unless results of the same run exist.

    Returns the content of the metrics file.
    """
    if existing := existing_results(test_set, out, run):
        print(f"{task_files(out, test_set.task)[0]} already exists, with the same model, data and settings", flush=True)
        return existing
    items = test_set.items
    prompts = open_template(test_set.template, model.tokenizer).encode_prompts([item["input"] for item in items],
                                                                               test_set.max_source_length)
    if long := sum(len(ids) == test_set.max_source_length for ids in prompts):
        print(f"{long:,} of {len(prompts):,} prompts of {test_set.task} reach max_source_length "
              f"{test_set.max_source_length:,}, to which longer ones are cut", flush=True)
    predictions = [model.tokenizer.decode(ids).strip() for ids in model.generate(prompts, test_set.decoding)]
    references = [item.get("references") or [item["output"]] for item in items]
    sources = [restore_brackets(item["src_info"].get(test_set.source) or item["input"]) for item in items]
    values = item_scores(test_set, sources, predictions, references)
    metrics = {"bleu": bleu(predictions, references)} | {name: bootstrap_interval(scores)
                                                         for name, scores in values.items()}
    if test_set.sari:
        metrics["sari"], values["sari"] = sari(sources, predictions, references)
    lines = [item | {"prediction": text, "scores": {name: round(scores[i], 4) for name, scores in values.items()}}
             for i, (item, text) in enumerate(zip(items, predictions))]
    return write_task_results(out, test_set.task, lines, metrics, record(test_set, run) | {"commit": git_commit()})


def item_scores(test_set: TaskTestSet, sources: list[str], predictions: list[str],
                references: list[list[str]]) -> dict[str, list[float]]:
    """{metric: score of each item} for all metrics that are defined for single items."""
    scores = rouge(predictions, references)
    if test_set.sari:
        scores["sari_hf"] = [sari_hf(*texts) for texts in zip(sources, predictions, references)]
    if test_set.bertscore_model:
        scores["bertscore"] = bertscore(predictions, references, test_set.bertscore_model, test_set.bertscore_layer)
    return scores | sanity_metrics(predictions, sources)
