"""Evaluates a checkpoint: generation on the test sets of tasks, and a suite of benchmarks.

    python evaluate.py --checkpoint runs/tiny/stack/m1-simp --tasks simp,empd --data data/prepared/sample --suite sample
    torchrun --nproc_per_node 8 evaluate.py …                                              (the same flags)

Writes predictions-<task>.jsonl and metrics-<task>.json for each task, and results_<date>.json for the suite, into the
folder `eval` of the checkpoint. Existing results of the same weights, data and settings are kept.
"""
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common import settings
from common.distributed import Distributed, resolve_dtype
from common.files import UserError, digest
from common.settings import read_config, setting
from corpus.tasks import read_task
from evaluation.parallel import ParallelModel
from evaluation.suites import Benchmark
from evaluation.summary import print_suite, print_tasks
from evaluation.test_sets import TaskTestSet, evaluate_test_set, task_decoding
from model.checkpoint import checkpoint_digest, open_checkpoint
from model.hub import fetch_checkpoint, load_model
from model.parameter_files import POSTERIOR, find_parameter_files, open_side_files
from model.tokenizer import TOKENIZER_FILES, Tokenizer


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one evaluation."""
    checkpoint: str = setting(None, "checkpoint to evaluate: a directory or a Hub id", required=True)
    out: str | None = setting(None, "folder for the results; none: eval in the checkpoint's directory")
    tasks: tuple[str, ...] = setting((), "tasks whose test sets are generated (files in configs/task)", names="task")
    data: str | None = setting(None, "folder of the preprocessed task files, <task>.json")
    suite: str | None = setting(None, "suite of benchmarks: a name in configs/eval, or the path of a .toml file")
    suite_files: str | None = setting(None, "folder of the suite's local files; none: the folder of its .toml file")
    limit: int | None = setting(None, "use only the first N test items of each task and benchmark", at_least=1)
    max_source_length: int = setting(1024, "maximum number of tokens of a prompt, including <bos>", at_least=16)
    seed: int = setting(42, "seed for decoding by sampling, and for posterior samples", at_least=0)
    posterior_samples: int = setting(0, "number of weight samples from the checkpoint's posterior; adds benchmark "
                                     "results with the options' probabilities averaged over them", at_least=0)
    bertscore_model: str | None = setting(None, "directory of an encoder for BERTScore (needs the package bert-score)")
    bertscore_layer: int | None = setting(None, "layer of the encoder that BERTScore compares", at_least=1)
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "dtype of the weights; auto: bf16 if the hardware "
                                                     "multiplies bf16 matrices")

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        problems = ["--tasks needs --data, the folder of their files"] if self.tasks and not self.data else []
        if not self.tasks and not self.suite:
            problems.append("there is nothing to evaluate: give --tasks or --suite")
        if (self.bertscore_model is None) != (self.bertscore_layer is None):
            problems.append("bertscore_model and bertscore_layer must be given together")
        return problems


def main(cfg: EvaluateConfig) -> None:
    """Evaluates on all processes: rank 0 sends requests, the other ranks serve them."""
    with Distributed(datetime.timedelta(days=1)) as dist:  # the other ranks wait while rank 0 downloads datasets
        run, test_sets, suite = dist.on_rank0(lambda: prepare_evaluation(cfg))
        source = dist.local_rank0_first(lambda: fetch_checkpoint(cfg.checkpoint))
        dtype = torch.bfloat16 if run["dtype"] == "bf16" else torch.float32
        model = ParallelModel(dist, load_model(source, dtype, dist.device), Tokenizer(source))
        if dist.rank:
            return model.serve()
        print(f"evaluating {cfg.checkpoint}: {run['dtype']} on {dist.world_size} × {dist.device.type}", flush=True)
        out = Path(cfg.out or source / "eval")
        results: dict[str, Any] = {"results": {}, "missing": {}}
        try:
            task_results = [evaluate_test_set(test_set, model, out, run) for test_set in test_sets]
            if suite:
                from evaluation.benchmarks import evaluate_suite  # lm-eval takes seconds to import
                results = evaluate_suite(suite, model, out, run, cfg.posterior_samples, cfg.seed)
        except UserError:  # raised between two requests, so the other ranks wait for the next one
            model.dismiss()
            raise
        model.dismiss()
        if task_results:
            print_tasks(task_results)
        if results["results"]:
            print_suite(suite, results)
        print(f"results: {out}", flush=True)
        if missing := results["missing"]:
            names = {reason: [name for name in missing if missing[name] == reason] for reason in missing.values()}
            raise UserError(f"the datasets of {len(missing)} benchmarks are not available, the others were run: "
                            + "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items())
                            + ". To run without a network, evaluate once on a machine with one, copy its cache of "
                              "datasets (HF_HOME) here and set HF_DATASETS_OFFLINE=1; or use a suite with local files")


def prepare_evaluation(cfg: EvaluateConfig) -> tuple[dict[str, Any], list[TaskTestSet], list[Benchmark]]:
    """Checks checkpoint, tasks and suite before the model is loaded. Runs on rank 0 only.

    Returns the run record, the test sets, and the benchmarks.
    """
    checkpoint = open_checkpoint(fetch_checkpoint(cfg.checkpoint), require_eos=True)
    source, config = checkpoint.directory, checkpoint.config
    posterior = find_parameter_files(source, POSTERIOR) if cfg.posterior_samples else []
    if cfg.posterior_samples and not open_side_files(posterior, POSTERIOR, source, config):
        raise UserError(f"{source} has no posterior to sample weights from: it was not fine-tuned with IVON; "
                        "leave out --posterior_samples")
    test_sets, suite = open_test_sets(cfg, config.max_position_embeddings), []
    if cfg.suite:
        from evaluation.lm_eval_tasks import read_suite  # lm-eval takes seconds to import
        suite = read_suite(cfg.suite, cfg.suite_files)
    tokenizer_files = [source / name for name in TOKENIZER_FILES if (source / name).exists()]
    run = {"checkpoint": cfg.checkpoint, "checkpoint_digest": checkpoint_digest(source),
           "tokenizer_digest": digest(tokenizer_files), "dtype": resolve_dtype(cfg.dtype), "limit": cfg.limit}
    return run, test_sets, suite


def open_test_sets(cfg: EvaluateConfig, max_length: int) -> list[TaskTestSet]:
    """The test sets of all tasks. Raises UserError if one is empty or may exceed the model's context, `max_length`."""
    test_sets, problems = [], []
    for task in cfg.tasks:
        path = Path(cfg.data or "", f"{task}.json")
        if not path.is_file():
            problems.append(f"{path} does not exist: make it with data_prep.py task, or `make data TASK={task}`")
            continue
        items, decoding = read_task(path)[0]["test"][:cfg.limit], task_decoding(task, cfg.seed)
        if not items:
            problems.append(f"the test set of {path} is empty: make it from a raw folder with a test file")
        if cfg.max_source_length + decoding.max_new_tokens > max_length:
            problems.append(f"max_source_length {cfg.max_source_length} + max_new_tokens {decoding.max_new_tokens} of "
                            f"{task} is more than the model's max_position_embeddings {max_length}: lower "
                            "max_source_length")
        spec = read_config("task", task)
        test_sets.append(TaskTestSet(task, items, digest([path]), decoding, cfg.max_source_length, spec["source"],
                                     spec.get("sari", False), cfg.bertscore_model, cfg.bertscore_layer))
    if problems:
        raise UserError("; ".join(problems))
    return test_sets


if __name__ == "__main__":
    settings.run((EvaluateConfig, main), __doc__)
