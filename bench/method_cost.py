"""The cost of each method against forgetting, compared with plain fine-tuning: time and memory.

    python bench/method_cost.py --data data/prepared/sample/simp.json --folder /tmp/costs           the size small
    python bench/method_cost.py --data … --folder … --checkpoint DIR                                your own checkpoint
    python bench/method_cost.py … --methods vcl --stages 0,1,2,3 --processes 1,2

Each method fine-tunes for some steps on a first task and on a later one, the two halves of the data, under each ZeRO
stage with each number of processes. Runs follow one another; `replay` uses the installed packages' documentation.
`step` is the median time of all steps but the first two, and `ratio` is that of plain fine-tuning on the same task.
`once` is the seconds outside the steps, minus those of plain fine-tuning: for generated texts, the Fisher information
and the posterior. `bytes` is the peak memory of rank 0 minus that of plain fine-tuning, per weight of the model (under
ZeRO, of the rank's share). Memory is measured in a separate run that returns freed memory at once, which
takes time.
"""
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.workload import FRUGAL_MALLOC, SimpBenchConfig, run_train, small_checkpoint
from common.configs import known, unknown_name
from common.scripts import run
from common.settings import setting
from corpus.tasks import read_task, write_task
from data_prep import TextDataConfig, prepare_text
from model.config import ModelConfig
from pipeline.chain import method_flags, method_settings

BASELINE = "finetune"


@dataclass(frozen=True)
class MethodBenchConfig(SimpBenchConfig):
    """Settings of the comparison."""
    methods: tuple[str, ...] = setting(tuple(known("method")), "files in configs/method; settings of train.py may "
                                                               "follow: ewc:ewc_strength=10")
    stages: tuple[int, ...] = setting((1,), "ZeRO stages", at_least=0, at_most=3)
    processes: tuple[int, ...] = setting((1,), "numbers of processes", at_least=1)
    steps: int = setting(8, "steps", at_least=3)
    dtype: Literal["fp32", "bf16"] = setting("fp32", "weights; bf16 needs ZeRO stages above 0")

    def problems(self):
        return [line for method in self.methods for line in unknown_name("method", method.partition(":")[0])]


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, seconds outside of the steps, and peak bytes of rank 0."""
    step: float
    once: float
    memory: int


def write_halves(cfg, folder):
    """Writes the two halves of the training samples as separate files; returns {"first": path, "later": path}."""
    splits, paths = read_task(cfg.data)[0], {}
    for half, task in enumerate(("first", "later")):
        paths[task] = folder / f"{task}.json"
        write_task(paths[task], splits | {"train": splits["train"][half::2]})
    return paths


def measure_cost(cfg, out, init, data, zero, processes, method):
    """The cost of a run on `data` that leaves its checkpoint in `out`."""
    settings = method_settings(method)
    own = ["--replay_text", Path(cfg.folder) / "text"] if "replay_share" in settings else []
    own += ["--rehearsal", 0] if "rehearsal" in settings and data.stem == "first" else []

    def train(steps):
        return run_train(processes, out, "--init", init, "--data", data, "--zero", zero, "--dtype", cfg.dtype,
                         "--max_steps", steps, "--max_eval_samples", 2, *method_flags(method), *own)

    with patch.dict(os.environ, FRUGAL_MALLOC):
        memory = train(4)[0]["peak_memory_bytes"]
    began = time.perf_counter()
    result, steps = train(cfg.steps)
    once = time.perf_counter() - began - result["seconds"]
    return Cost(statistics.median(after["elapsed"] - before["elapsed"] for before, after in zip(steps[1:], steps[2:])),
                once, memory)


def main(cfg):
    """Prints a line for each run."""
    folder, checkpoint = Path(cfg.folder), cfg.checkpoint or small_checkpoint(cfg.folder)
    parameters = ModelConfig.read(Path(checkpoint) / "config.json").num_parameters
    prepare_text(TextDataConfig(output_path=str(folder / "text"), tokenizer=str(checkpoint), max_documents=200))
    print(f"{'ZeRO':>4} {'processes':>9}  {'method':<24} {'task':<5} {'step':>8} {'ratio':>6} {'once':>8} "
          f"{'memory':>8} {'bytes':>6}")
    for zero in cfg.stages:
        for processes in cfg.processes:
            kept = parameters / (processes if zero else 1)
            baseline, halves = {}, write_halves(cfg, folder)
            for method in dict.fromkeys((BASELINE, *cfg.methods)):
                init = checkpoint
                for task in ("first", "later"):
                    out = folder / f"{method.replace(':', '-')}-{task}"
                    cost = measure_cost(cfg, out, init, halves[task], zero, processes, method)
                    plain, init = baseline.setdefault(task, cost), out
                    print(f"{zero:>4} {processes:>9}  {method:<24} {task:<5} {cost.step:7.2f}s "
                          f"{cost.step / plain.step:6.2f} {cost.once - plain.once:+7.1f}s {cost.memory / 2**30:7.2f}G "
                          f"{(cost.memory - plain.memory) / kept:6.1f}", flush=True)


if __name__ == "__main__":
    run((MethodBenchConfig, main), __doc__)
