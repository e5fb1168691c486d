"""Generation of a task's test set, and the metrics of the generated texts."""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import UserError, read_json
from common.provenance import git_commit
from common.settings import read_config
from corpus.raw_tasks import restore_brackets
from corpus.tasks import encode_prompts
from evaluation.metrics import bertscore, bleu, bootstrap_interval, rouge, sanity_metrics, sari
from evaluation.parallel import ParallelModel
from evaluation.result_files import is_same_run, task_files, write_task_results
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
    sari: bool
    bertscore_model: str | None
    bertscore_layer: int | None


def make_generation_config(options: dict[str, Any], where: str) -> GenerationConfig:
    """A GenerationConfig from settings by name. Raises UserError, which begins with `where`, for invalid ones."""
    names = {field.name for field in dataclasses.fields(GenerationConfig)}
    problems = [f"unsupported setting {name!r}" for name in sorted(options.keys() - names)]
    config = GenerationConfig(**{name: value for name, value in options.items() if name in names})
    if problems := problems + config.problems():
        raise UserError(f"{where}: " + "; ".join(problems))
    return config


def task_decoding(task: str, seed: int) -> GenerationConfig:
    """The decoding of a task, from the table [decoding] in its config file."""
    return make_generation_config(read_config("task", task)["decoding"] | {"seed": seed},
                                  f"configs/task/{task}.toml [decoding]")


def evaluate_test_set(test_set: TaskTestSet, model: ParallelModel, out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Generates a test set and writes its predictions and metrics to `out`, unless results of the same run exist.

    Returns the content of the metrics file.
    """
    facts = dataclasses.asdict(dataclasses.replace(test_set, items=[]))
    run = run | {name: value for name, value in facts.items() if name not in ("task", "items")}
    metrics_file, predictions_file = task_files(out, test_set.task)
    if metrics_file.exists() and predictions_file.exists():
        existing = read_json(metrics_file)
        if is_same_run(existing.get("run", {}), run):
            print(f"{metrics_file} already exists, with the same model, data and settings", flush=True)
            return existing
    items = test_set.items
    prompts = encode_prompts(model.tokenizer, [item["input"] for item in items], test_set.max_source_length)
    predictions = [model.tokenizer.decode(ids).strip() for ids in model.generate(prompts, test_set.decoding)]
    references = [item.get("references") or [item["output"]] for item in items]
    values = item_scores(test_set, predictions, references)
    metrics = {"bleu": bleu(predictions, references)} | {name: bootstrap_interval(scores)
                                                         for name, scores in values.items()}
    lines = [item | {"prediction": text, "scores": {name: round(scores[i], 4) for name, scores in values.items()}}
             for i, (item, text) in enumerate(zip(items, predictions))]
    return write_task_results(out, test_set.task, lines, metrics, run | {"commit": git_commit()})


def item_scores(test_set: TaskTestSet, predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """{metric: score of each item} for all metrics that are defined for single items."""
    sources = [restore_brackets(item.get("src_info", {}).get(test_set.source) or item["input"])
               for item in test_set.items]
    scores = rouge(predictions, references)
    if test_set.sari:
        scores["sari"] = [sari(*texts) for texts in zip(sources, predictions, references)]
    if test_set.bertscore_model:
        scores["bertscore"] = bertscore(predictions, references, test_set.bertscore_model, test_set.bertscore_layer)
    return scores | sanity_metrics(predictions, sources)
