"""The cost of IVON compared with AdamW: time of a step, and memory.

    python bench/ivon_cost.py --data data/prepared/sample/simp.json --folder /tmp/ivon            the size small
    python bench/ivon_cost.py --data … --folder … --checkpoint DIR                                your own checkpoint

Fine-tunes for some steps with AdamW, then with IVON as the first task and as a later task, whose prior is the posterior
of the first. It does so under each ZeRO stage with each number of processes. `step` is the median time of all steps but
the first two. `bytes` is the peak memory of rank 0 above that with AdamW, per weight that the rank keeps (a share of
them under ZeRO). It is measured in a separate run that returns freed memory at once, which takes time.
"""
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.workload import FRUGAL_MALLOC, SimpBenchConfig, run_train, small_checkpoint
from common.scripts import run
from common.settings import setting
from model.config import ModelConfig


@dataclass(frozen=True)
class IvonBenchConfig(SimpBenchConfig):
    """Settings of the comparison."""
    stages: tuple[int, ...] = setting((0, 1, 2, 3), "ZeRO stages", at_least=0, at_most=3)
    processes: tuple[int, ...] = setting((1, 2), "numbers of processes", at_least=1)
    steps: int = setting(8, "steps", at_least=3)
    dtype: Literal["fp32", "bf16"] = setting("fp32", "weights; bf16 needs ZeRO stages above 0")


def measure_cost(cfg, out, init, zero, processes, method):
    """Returns (seconds of a step, peak bytes of rank 0) of a run that leaves its checkpoint in `out`."""
    def train():
        return run_train(processes, out, "--init", init, "--data", cfg.data, "--zero", zero, "--dtype", cfg.dtype,
                         "--max_steps", cfg.steps, "--max_eval_samples", 2, "--method", method)

    _, steps = train()
    times = [after["elapsed"] - before["elapsed"] for before, after in zip(steps[1:], steps[2:])]
    with patch.dict(os.environ, FRUGAL_MALLOC):
        return statistics.median(times), train()[0]["peak_memory_bytes"]


def main(cfg):
    """Prints a line for each kind of run."""
    folder, checkpoint = Path(cfg.folder), cfg.checkpoint or small_checkpoint(cfg.folder)
    parameters = ModelConfig.read(Path(checkpoint) / "config.json").num_parameters
    print(f"{'ZeRO':>4} {'processes':>9}  {'run':<14} {'step':>8} {'ratio':>6} {'memory':>8} {'bytes':>6}")
    for zero in cfg.stages:
        for processes in cfg.processes:
            kept = parameters / (processes if zero else 1)
            adamw = None
            for name, init, method in (("AdamW", checkpoint, "finetune"), ("first task", checkpoint, "vcl"),
                                       ("later task", folder / "first task", "vcl")):
                seconds, memory = measure_cost(cfg, folder / name, init, zero, processes, method)
                adamw = adamw or (seconds, memory)
                print(f"{zero:>4} {processes:>9}  {name:<14} {seconds:7.2f}s {seconds / adamw[0]:6.2f} "
                      f"{memory / 2**30:7.2f}G {(memory - adamw[1]) / kept:6.1f}", flush=True)


if __name__ == "__main__":
    run((IvonBenchConfig, main), __doc__)
