"""Log-likelihoods compared with lm-eval's own Hugging Face backend: the same values, and the speed-up.

    python bench/scoring.py --checkpoint DIR --files DIR                 both dtypes: differences in fp32, speed in bf16
    python bench/scoring.py --checkpoint DIR --files DIR --dtypes bfloat16 --repeats 2
    python bench/scoring.py --checkpoint DIR                             the sample suite, in data/eval/sample

Both score the same requests of lm-eval's tasks in alternation: the backend in batches of `batch_size`, this project
with shared prefixes. The tasks are those of configs/eval/local.toml and HellaSwag's endings without labels, or those of
the sample suite. Columns:

    allowed      the speed-up that sharing allows by token count: the tokens that the backend computes, once for all
                 continuations of one token, over the tokens of the prefix tree. Padding is not counted.
    difference   the largest difference between the two
    off          the mean difference of each from the backend in the first dtype
"""
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import timed
from common.distributed import Distributed
from common.scripts import run
from common.settings import setting
from evaluation.harness import HarnessModel
from evaluation.lm_eval_tasks import local_task, read_suite
from evaluation.parallel import ParallelModel
from evaluation.suites import Benchmark
from model.hub import load_model
from model.tokenizer import Tokenizer

NAMES = ("boolq", "piqa", "mmlu", "commonsense_qa", "hellaswag", "crows_pairs_english")


@dataclass(frozen=True)
class ScoringBenchConfig:
    """Settings of the benchmark."""
    checkpoint: str = setting(None, "checkpoint directory", required=True)
    files: str | None = setting(None, "folder of the JSONL files named in configs/eval/local.toml; none: the sample "
                                      "suite's files")
    names: tuple[str, ...] = setting(NAMES, "benchmarks of these files")
    items: int = setting(200, "items of each benchmark", at_least=1)
    batch_size: int = setting(16, "requests in a batch of the backend", at_least=1)
    dtypes: tuple[str, ...] = setting(("float32", "bfloat16"), "dtypes of the weights, as in torch")
    repeats: int = setting(1, "measurements of each benchmark", at_least=1)


def tasks(cfg):
    """Yields (name, lm-eval task with the requests of its first items)."""
    suite = {benchmark.name: benchmark for benchmark in read_suite("local" if cfg.files else "sample", cfg.files)
             if not benchmark.part_of}
    if cfg.files:
        suite["hellaswag"] = Benchmark("hellaswag", "Rs", file=str(Path(cfg.files) / "hellaswag_unlabelled.jsonl"),
                                       options={"doc_to_text": "ctx", "doc_to_choice": "endings", "doc_to_target": 0})
        suite = {name: suite[name] for name in cfg.names}
    for name, benchmark in suite.items():
        task = local_task(benchmark)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=cfg.items, rank=0, world_size=1)
        yield name, task


def accuracy(task, values):
    """The task's first metric, computed from the values of its requests."""
    by_item = {}
    for request, value in zip(task.instances, values):
        by_item.setdefault(request.doc_id, (request.doc, []))[1].append(value)
    return float(np.mean([next(iter(task.process_results(*item).values())) for item in by_item.values()]))


def backend_tokens(model, requests):
    """Tokens that lm-eval's backend computes: it shares continuations of one token."""
    pairs = (model._encode_pair(*request.args) if request.args[0] else
             ([model.prefix_token_id], model.tok_encode(request.args[1], False)) for request in requests)
    return sum(map(len, {tuple(context + continuation[:-1]) for context, continuation in pairs}))


def main(cfg):
    """Prints a line for each benchmark and dtype."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    reference = {}  # the backend's values in the first dtype
    with Distributed() as dist:
        print(f"{dist.device.type}, {torch.get_num_threads()} threads, batch {cfg.batch_size}, {cfg.items} items each")
        print(f"{'':<20} {'dtype':<9} {'requests':>8} {'tokens: backend':>15} {'ours':>8} {'allowed':>7} "
              f"{'seconds':>8} {'ours':>7} {'faster':>6} {'of allowed':>10} {'difference':>10} {'off':>8} {'ours':>8} "
              f"{'accuracy':>8} {'ours':>6}")
        for name in cfg.dtypes:
            dtype = getattr(torch, name)
            backend = HFLM(AutoModelForCausalLM.from_pretrained(cfg.checkpoint, dtype=dtype).to(dist.device),
                           batch_size=cfg.batch_size, tokenizer=AutoTokenizer.from_pretrained(cfg.checkpoint))
            model = load_model(cfg.checkpoint, dtype, dist.device)
            for title, task in tasks(cfg):
                requests, seconds = task.instances, [0.0, 0.0]
                for _ in range(cfg.repeats):
                    scorer = ParallelModel(dist, model, Tokenizer(cfg.checkpoint))
                    answers = []
                    for index, harness_model in enumerate((backend, HarnessModel(scorer))):
                        took, answer = timed(harness_model.loglikelihood, requests, True)
                        answers.append(answer)
                        seconds[index] += took / cfg.repeats
                tokens, computed = backend_tokens(HarnessModel(scorer), requests), scorer.counts["computed"]
                values = np.array([[value for value, _ in answer] for answer in answers])
                off = np.abs(values - reference.setdefault(title, values[0])).mean(1)
                faster, allowed = seconds[0] / seconds[1], tokens / computed
                accuracies = [accuracy(task, answer) for answer in answers]
                print(f"{title:<20} {name:<9} {len(requests):>8} {tokens:>15,} {computed:>8,} {allowed:>7.2f} "
                      f"{seconds[0]:>8.1f} {seconds[1]:>7.1f} {faster:>6.2f} {faster / allowed:>10.0%} "
                      f"{np.abs(values[0] - values[1]).max():>10.1e} {off[0]:>8.1e} {off[1]:>8.1e} "
                      f"{accuracies[0]:>8.3f} {accuracies[1]:>6.3f}", flush=True)


if __name__ == "__main__":
    run((ScoringBenchConfig, main), __doc__)
