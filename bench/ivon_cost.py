"""What probabilistic mode costs beside AdamW: the time of a step, and memory.

    python bench/ivon_cost.py --data data/prepared/sample/simp.json --folder /tmp/variational     the size small
    python bench/ivon_cost.py --data … --folder … --checkpoint DIR                                one of one's own

Fine-tunes for some steps with AdamW, then with IVON as a first task and as a later one, whose prior is the
first one's posterior, under each ZeRO stage and number of processes. `step` is the median time of the steps after the
first two; `bytes` is what rank 0 held at most beyond AdamW's run, for each weight that it keeps (a share of them under
ZeRO), in a run of its own in which freed memory is given back at once, which takes time.
"""
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import FRUGAL, small_checkpoint, train
from common.files import read_json, read_json_lines
from common.settings import run, setting
from model.config import ModelConfig


@dataclass(frozen=True)
class VariationalBenchSettings:
    """Settings of the comparison."""
    data: str | None = setting(None, "preprocessed file of the task simp")
    folder: str | None = setting(None, "folder to work in")
    checkpoint: str | None = setting(None, "checkpoint to fine-tune; none: random weights of the size small")
    stages: tuple[int, ...] = setting((0, 1, 2, 3), "ZeRO stages")
    processes: tuple[int, ...] = setting((1, 2), "numbers of processes")
    steps: int = setting(8, "steps")
    dtype: str = setting("fp32", "dtype of the weights: fp32, or bf16 with ZeRO stages above 0")

    def problems(self):
        return [f"--{name} is missing" for name in ("data", "folder") if not getattr(self, name)]


def run_once(cfg, out, init, zero, processes, *flags):
    """(seconds of a step, bytes that rank 0 held at most) of a run that leaves its checkpoint in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    train(processes, "--init", init, "--data", cfg.data, "--out", out, "--zero", zero, "--dtype", cfg.dtype,
          "--max_steps", cfg.steps, "--max_eval_samples", 2, *flags)
    lines = [line for line in read_json_lines(out / "metrics.jsonl") if "loss" in line]
    times = [b["elapsed"] - a["elapsed"] for a, b in zip(lines[1:], lines[2:])]
    return statistics.median(times), read_json(out / "run.json")["result"]["peak_memory_bytes"]


def measure(*arguments):
    """(seconds, bytes) of a run, the bytes with freed memory given back."""
    seconds, _ = run_once(*arguments)
    with patch.dict(os.environ, FRUGAL):
        return seconds, run_once(*arguments)[1]


def main(cfg):
    """Prints a line for each kind of run."""
    folder = Path(cfg.folder)
    checkpoint = Path(cfg.checkpoint or small_checkpoint(folder))
    parameters = ModelConfig.read(checkpoint / "config.json").num_parameters
    print(f"{'ZeRO':>4} {'processes':>9}  {'run':<14} {'step':>8} {'ratio':>6} {'memory':>8} {'bytes':>6}")
    for zero in cfg.stages:
        for processes in cfg.processes:
            kept = parameters / (processes if zero else 1)
            base = None
            for name, init, flags in (("AdamW", checkpoint, ("--method", "finetune")),
                                      ("first task", checkpoint, ("--method", "vcl")),
                                      ("later task", folder / "first task", ("--method", "vcl"))):
                seconds, memory = measure(cfg, folder / name, init, zero, processes, *flags)
                base = base or (seconds, memory)
                print(f"{zero:>4} {processes:>9}  {name:<14} {seconds:7.2f}s {seconds / base[0]:6.2f} "
                      f"{memory / 2**30:7.2f}G {(memory - base[1]) / kept:6.1f}", flush=True)


if __name__ == "__main__":
    run((VariationalBenchSettings, main), __doc__)
