"""Log-likelihoods beside lm-eval's own Hugging Face backend: the same values, and how much faster.

    python bench/scoring.py --checkpoint DIR --files DIR                 both dtypes: differences in fp32, speed in bf16
    python bench/scoring.py --checkpoint DIR --files DIR --dtypes bfloat16 --repeats 2
    python bench/scoring.py --checkpoint DIR                             the sample suite, in data/eval/sample

Both score the same requests of lm-eval's tasks, those of configs/eval/local.toml and HellaSwag's endings without
labels, or those of the sample suite, in turns: the backend in batches of `batch_size`, ours with shared prefixes.
`allowed` is what sharing allows by token count: the tokens that the backend computes, once for all continuations of
one token, over those of the tree of all prefixes. Padding is not counted. `difference` is the largest between the two,
`off` how far each lies on average from the backend in the first of the dtypes.
"""
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.distributed import Distributed
from common.settings import run, setting
from evaluation.harness import HarnessModel
from evaluation.lm_eval_tasks import local_task, read_suite
from evaluation.parallel import ParallelModel
from evaluation.suites import Benchmark
from model.hub import load_model
from model.tokenizer import Tokenizer

NAMES = ("boolq", "piqa", "mmlu", "commonsense_qa", "hellaswag", "crows_pairs_english")


@dataclass(frozen=True)
class ScoringBenchSettings:
    """Settings of the benchmark."""
    checkpoint: str | None = setting(None, "checkpoint directory")
    files: str | None = setting(None, "folder of the JSONL files that configs/eval/local.toml names; none: the sample "
                                      "suite's")
    names: tuple[str, ...] = setting(NAMES, "benchmarks of those files")
    items: int = setting(200, "items of each")
    batch_size: int = setting(16, "requests at once in the backend")
    dtypes: tuple[str, ...] = setting(("float32", "bfloat16"), "dtypes of the weights, names of torch's")
    repeats: int = setting(1, "times that each is measured")

    def problems(self):
        return [] if self.checkpoint else ["--checkpoint is missing"]


def tasks(cfg):
    """The lm-eval tasks, with the requests of their first items."""
    suite = {benchmark.name: benchmark for benchmark in read_suite("local" if cfg.files else "sample", cfg.files)
             if not benchmark.part_of}
    if cfg.files:
        suite["hellaswag"] = Benchmark("hellaswag", "Rs", file=str(Path(cfg.files) / "hellaswag_unlabelled.jsonl"),
                                       options={"doc_to_text": "ctx", "doc_to_choice": "endings", "doc_to_target": 0})
        suite = {name: suite[name] for name in cfg.names}
    for name, benchmark in suite.items():
        task = local_task(benchmark)
        task.set_config(key="num_fewshot", value=benchmark.num_fewshot)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=cfg.items, rank=0, world_size=1)
        yield name, task


def accuracy(task, requests, values):
    """The task's first metric over the values of its requests."""
    by_item = {}
    for request, value in zip(requests, values):
        by_item.setdefault(request.doc_id, (request.doc, []))[1].append(value)
    figures = [task.process_results(item, found) for item, found in by_item.values()]
    return float(np.mean([next(iter(figure.values())) for figure in figures]))


def main(cfg):
    """Prints a line for each benchmark and dtype."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    first = {}  # the backend's values in the first dtype
    with Distributed() as dist:
        print(f"{dist.device.type}, {torch.get_num_threads()} threads, batch {cfg.batch_size}, {cfg.items} items each")
        print(f"{'':<20} {'dtype':<9} {'requests':>8} {'tokens: backend':>15} {'ours':>8} {'allowed':>7} "
              f"{'seconds':>8} {'ours':>7} {'faster':>6} {'of allowed':>10} {'difference':>10} {'off':>8} {'ours':>8} "
              f"{'accuracy':>8} {'ours':>6}")
        for name in cfg.dtypes:
            dtype = getattr(torch, name)
            theirs = HFLM(AutoModelForCausalLM.from_pretrained(cfg.checkpoint, dtype=dtype).to(dist.device),
                          batch_size=cfg.batch_size, tokenizer=AutoTokenizer.from_pretrained(cfg.checkpoint))
            model = load_model(cfg.checkpoint, dtype, dist.device)
            for title, task in tasks(cfg):
                requests, seconds = task.instances, [0.0, 0.0]
                for _ in range(cfg.repeats):
                    scorer = ParallelModel(dist, model, Tokenizer(cfg.checkpoint))
                    ours, values = HarnessModel(scorer), []
                    for index, backend in enumerate((theirs, ours)):
                        began = time.perf_counter()
                        values.append(backend.loglikelihood(requests, disable_tqdm=True))
                        seconds[index] += (time.perf_counter() - began) / cfg.repeats
                inputs = {tuple(context + continuation[:-1]) for context, continuation in
                          (ours._encode_pair(*request.args) if request.args[0] else
                           ([ours.prefix_token_id], ours.tok_encode(request.args[1], False)) for request in requests)}
                asked, computed = sum(map(len, inputs)), scorer.counts["computed"]
                theirs_and_ours = np.array([[value for value, _ in found] for found in values])
                off = np.abs(theirs_and_ours - first.setdefault(title, theirs_and_ours[0])).mean(1)
                faster, allowed = seconds[0] / seconds[1], asked / computed
                accuracies = [accuracy(task, requests, found) for found in values]
                print(f"{title:<20} {name:<9} {len(requests):>8} {asked:>15,} {computed:>8,} {allowed:>7.2f} "
                      f"{seconds[0]:>8.1f} {seconds[1]:>7.1f} {faster:>6.2f} {faster / allowed:>10.0%} "
                      f"{np.abs(theirs_and_ours[0] - theirs_and_ours[1]).max():>10.1e} {off[0]:>8.1e} {off[1]:>8.1e} "
                      f"{accuracies[0]:>8.3f} {accuracies[1]:>6.3f}", flush=True)


if __name__ == "__main__":
    run((ScoringBenchSettings, main), __doc__)
