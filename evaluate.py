"""Evaluates a checkpoint: losses on held-out text, the test sets of tasks, and a suite of benchmarks.

    python evaluate.py --checkpoint runs/tiny/stack/m1-simp --tasks simp,empd --data data/prepared/sample --suite sample
    python evaluate.py --checkpoint runs/tiny/stack/m1-simp --text data/text/tiny --reference runs/tiny/stack/m0
    torchrun --nproc_per_node 8 evaluate.py …                                              (the same flags)

Writes losses-text.json for the text, losses-task-<task>.json, predictions-<task>.jsonl and metrics-<task>.json for each
task, and results_<date>.json for the suite, into the folder `eval` of the checkpoint. Existing results of the same
weights, data and settings are kept.
"""
import common.preamble

import contextlib
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import scripts
from common.configs import CONFIGS, read_config
from common.distributed import Distributed
from common.dtypes import TORCH_DTYPES, resolve_dtype
from common.files import UserError, digest, parsing, read_json
from common.provenance import DEFAULT_TEMPLATE, TemplateName, last_template, read_lineage
from common.stop_request import StopRequest
from common.writing import check_writable, sole_use
from corpus.prompts import open_template
from corpus.tasks import first_items, lacking_source, read_task
from evaluation.evaluate_config import EvaluateConfig
from evaluation.losses import LossSet, evaluate_losses, existing_losses, open_loss_sets
from evaluation.metrics import SARI_VERSION, bertscore
from evaluation.parallel import ParallelModel
from evaluation.result_files import earlier_results
from evaluation.summary import loss_table, suite_table, task_table
from evaluation.test_sets import TaskTestSet, evaluate_test_set, existing_results, task_decoding
from model.checkpoint import checkpoint_digest, open_checkpoint
from model.hub import fetch_checkpoint, load_model, split_hub_id
from model.parameter_files import POSTERIOR, find_parameter_files, open_side_files
from model.tokenizer import Tokenizer, tokenizer_digest
from model.transformer import Transformer


@dataclass(frozen=True)
class PreparedEvaluation:
    """The checked inputs of an evaluation, with its datasets loaded."""
    out: Path
    run: dict[str, Any]  # what all results depend on
    loss_sets: list[LossSet]
    test_sets: list[TaskTestSet]  # to be decoded
    suite: Any  # a benchmarks.SuiteRun, or None: lm-eval takes seconds to import


def main(cfg: EvaluateConfig) -> None:
    """Evaluates on all processes: rank 0 sends requests, the other ranks serve them."""
    evaluation: PreparedEvaluation | None = None  # on rank 0

    def prepare() -> str:
        nonlocal evaluation
        out = results_folder(cfg)
        fetch_checkpoint(cfg.checkpoint)
        claimed.enter_context(sole_use(out))
        evaluation = prepare_evaluation(cfg)
        return evaluation.run["dtype"]

    with contextlib.ExitStack() as claimed, StopRequest(), \
            Distributed(datetime.timedelta(days=1)) as dist:  # the other ranks wait while rank 0 downloads datasets
        dtype = TORCH_DTYPES[dist.on_rank0(prepare)]
        torch.backends.cuda.enable_cudnn_sdp(False)  # it compiles a plan for every new shape

        def load(name: str) -> Transformer:
            source = dist.local_rank0_first(lambda: fetch_checkpoint(name))
            return dist.on_all_ranks(lambda: load_model(source, dtype, dist.device))

        if dist.world_size > dist.local_world_size:  # on a single node there is nothing to compare with
            dist.check_same_on_all_nodes(lambda: file_digests(cfg, evaluation.run if evaluation else None))

        model = ParallelModel(dist, load(cfg.checkpoint), Tokenizer(fetch_checkpoint(cfg.checkpoint)),
                              load(cfg.reference) if cfg.reference else None)
        if evaluation is None:
            return model.serve()
        print(f"evaluating {cfg.checkpoint}: {evaluation.run['dtype']} on {dist.world_size} × {dist.device.type}",
              flush=True)
        try:
            evaluate(evaluation, model)
        except (UserError, OSError, MemoryError):  # raised between two requests: the other ranks wait for the next one
            model.dismiss()
            raise
        model.dismiss()


def evaluate(evaluation: PreparedEvaluation, model: ParallelModel) -> None:
    """Evaluates the model and prints tables. Raises UserError at the end if datasets of benchmarks are missing."""
    out, run = evaluation.out, evaluation.run
    tables, missing = [], {}
    if evaluation.loss_sets:
        tables.append(loss_table([evaluate_losses(loss_set, model, out, run) for loss_set in evaluation.loss_sets]))
    if evaluation.test_sets:
        tables.append(task_table([evaluate_test_set(test_set, model, out, run) for test_set in evaluation.test_sets]))
    if evaluation.suite:
        from evaluation.benchmarks import evaluate_suite
        results = evaluate_suite(evaluation.suite, model, out)
        missing = results["missing"]
        if results["results"]:
            tables.append(suite_table(evaluation.suite.suite, results))
    for table in tables:
        print(f"\n{table}")
    print(f"results: {out}", flush=True)
    if missing:
        names = {reason: [name for name in missing if missing[name] == reason] for reason in missing.values()}
        others = "the others were run" if results["results"] else "no benchmark was run"
        raise UserError(f"the datasets of {len(missing)} benchmarks are not available, {others}: "
                        + "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items())
                        + ". To run without a network, evaluate once on a machine with one, copy its cache of "
                          "datasets (HF_HOME) here and set HF_DATASETS_OFFLINE=1; or use a suite with local files")


def prepare_evaluation(cfg: EvaluateConfig) -> PreparedEvaluation:
    """Checks everything before the model is loaded: checkpoint, text, tasks, suite, and the folder for the results.

    Runs on rank 0 only.
    """
    checkpoint = open_checkpoint(fetch_checkpoint(cfg.checkpoint), require_eos=True)
    source, config = checkpoint.directory, checkpoint.config
    out = results_folder(cfg)
    check_writable(out)
    posterior = find_parameter_files(source, POSTERIOR) if cfg.posterior_samples else []
    if cfg.posterior_samples and not open_side_files(source, POSTERIOR, config):
        raise UserError(f"{source} has no posterior to sample weights from: it was not fine-tuned with IVON; "
                        "leave out --posterior_samples")
    if cfg.bertscore_model and cfg.tasks and cfg.decode:
        bertscore(["a text"], [["a text"]], cfg.bertscore_model, cfg.bertscore_layer)
    template = cfg.template or last_template(read_lineage(source)) or DEFAULT_TEMPLATE
    if cfg.tasks or cfg.template:
        open_template(template, checkpoint.tokenizer).check_length(cfg.max_source_length)
    test_sets, suite = open_test_sets(cfg, template, config.max_position_embeddings), None
    loss_sets = open_loss_sets(cfg, checkpoint, test_sets)
    test_sets = test_sets if cfg.decode else []
    run: dict[str, Any] = {
        "checkpoint": cfg.checkpoint, "checkpoint_digest": checkpoint_digest(source),
        "tokenizer_digest": tokenizer_digest(source), "dtype": resolve_dtype(cfg.dtype), "limit": cfg.limit}
    check_same_weights(out, run["checkpoint_digest"])
    for test_set in test_sets:
        existing_results(test_set, out, run)
    for loss_set in loss_sets:
        existing_losses(loss_set, out, run)
    if cfg.suite:
        from evaluation.benchmarks import prepare_suite
        from evaluation.lm_eval_tasks import read_suite
        sampled = {"posterior_samples": cfg.posterior_samples, "seed": cfg.seed, "posterior_digest": digest(posterior)}
        given = (sampled if posterior else {}) | ({"template": "chat"} if cfg.template == "chat" else {})
        suite = prepare_suite(read_suite(cfg.suite, cfg.suite_files), out, run | given,
                              config.max_position_embeddings, [
            (source, ("weights", cfg.seed, number)) for number in range(cfg.posterior_samples)])
    return PreparedEvaluation(out, run, loss_sets, test_sets, suite)


def file_digests(cfg: EvaluateConfig, run: Mapping[str, Any] | None = None) -> dict[str, str | None]:
    """The digests of what every node reads, by a description. Downloads it if needed. run: holds those of the
    checkpoint if they are known."""
    checkpoint = fetch_checkpoint(cfg.checkpoint)
    found: dict[str, str | None] = {
        f"the weights of {cfg.checkpoint}": run["checkpoint_digest"] if run else checkpoint_digest(checkpoint),
        f"the tokenizer files of {cfg.checkpoint}": tokenizer_digest(checkpoint)}
    if cfg.reference:
        found[f"the weights of {cfg.reference}"] = checkpoint_digest(fetch_checkpoint(cfg.reference))
    if cfg.posterior_samples:
        files = find_parameter_files(checkpoint, POSTERIOR)
        found[f"the posterior files of {cfg.checkpoint}"] = digest(files)
    return found


def results_folder(cfg: EvaluateConfig) -> Path:
    """The folder for the results. Raises UserError for a checkpoint from the Hub without --out."""
    if cfg.out is None and not Path(cfg.checkpoint).is_dir():
        repo_id, _ = split_hub_id(cfg.checkpoint)
        raise UserError(f"--out is missing: {repo_id} is not a directory here, and results next to a downloaded "
                        "checkpoint would be in the Hub's cache")
    return Path(cfg.out or Path(cfg.checkpoint) / "eval")


def check_same_weights(out: Path, weights_digest: str) -> None:
    """Raises UserError if a folder holds results of other weights: all results of a stage are of the same ones."""
    patterns = "metrics-*.json", "results_*.json", "losses-*.json"
    for path in (path for pattern in patterns for path in sorted(out.glob(pattern))):
        with earlier_results():
            run = read_json(path, dict).get("run") if path.is_file() else None
            recorded = run.get("checkpoint_digest") if isinstance(run, dict) else None
            if recorded is not None and recorded != weights_digest:
                raise UserError(f"{path} has results of other weights")


def open_test_sets(cfg: EvaluateConfig, template: TemplateName, max_length: int) -> list[TaskTestSet]:
    """The test sets of all tasks. Raises UserError if one is empty or may exceed the model's context, `max_length`."""
    test_sets, problems = [], []
    for task in cfg.tasks:
        path = Path(cfg.data or "", f"{task}.json")
        if not path.is_file():
            problems.append(f"{path} does not exist: make it with data_prep.py task, or `make data TASK={task}`")
            continue
        spec, decoding = read_config("task", task), task_decoding(task, cfg.seed)
        with parsing(CONFIGS / "task" / f"{task}.toml", "the description of a task"):
            source, sari = spec["source"], SARI_VERSION if spec.get("sari") else None
        items = first_items(read_task(path, source)[0]["test"], cfg.limit)
        if not items:
            problems.append(f"the test set of {path} is empty: make it from a raw folder with a test file")
        problems += [f"{path}: {problem}" for problem in lacking_source(items, source)] if sari and cfg.decode else []
        for name, length in (("max_target_length", cfg.max_target_length), ("max_new_tokens", decoding.max_new_tokens)):
            if (cfg.decode or name == "max_target_length") and cfg.max_source_length + length > max_length:
                problems.append(f"max_source_length {cfg.max_source_length} + {name} {length} of {task} is more than "
                                f"the model's max_position_embeddings {max_length}: lower max_source_length")
        test_sets.append(TaskTestSet(
            task=task, items=items, data_digest=digest([path]), decoding=decoding,
            max_source_length=cfg.max_source_length, source=source, sari=sari, bertscore_model=cfg.bertscore_model,
            bertscore_layer=cfg.bertscore_layer, template=template))
    if problems:
        raise UserError("; ".join(problems))
    return test_sets


if __name__ == "__main__":
    scripts.run((EvaluateConfig, main), __doc__)
