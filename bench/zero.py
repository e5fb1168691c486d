"""The ZeRO stages compared: losses, weights and memory.

    python bench/zero.py --data data/prepared/sample/simp.json --folder /tmp/zero          the size small, in fp32
    python bench/zero.py --data … --folder … --checkpoint DIR                              your own checkpoint

Fine-tunes for 20 steps under ZeRO 0, 1, 2, 3 and 3 with offload, with one and two processes each. `losses` is the
largest relative difference between a step's loss and that of the first run. `weights` is the largest norm of the
difference of a saved tensor, over the tensor's own norm.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.workload import SimpBenchConfig, run_train, small_checkpoint
from common.scripts import run
from common.settings import setting
from pipeline.jobs import split_words


@dataclass(frozen=True)
class ZeroBenchConfig(SimpBenchConfig):
    """Settings of the comparison."""
    steps: int = setting(20, "steps", at_least=1)
    flags: str = setting("", "more flags for train.py, such as '--method vcl --learning_rate 0.1'")


def main(cfg):
    """Prints a line for each run, and the largest differences."""
    checkpoint = cfg.checkpoint or small_checkpoint(cfg.folder)
    out, first, largest = Path(cfg.folder) / "run", None, (0.0, 0.0)
    print(f"{'ZeRO':<12} {'processes':>9} {'memory':>9} {'tokens/s':>9} {'losses':>9} {'weights':>9}")
    for stage in (["--zero", 0], ["--zero", 1], ["--zero", 2], ["--zero", 3], ["--zero", 3, "--offload"]):
        for processes in (1, 2):
            result, steps = run_train(
                processes, out, "--init", checkpoint, "--data", cfg.data, *stage, "--dtype", "fp32", "--max_steps",
                cfg.steps, "--learning_rate", 3e-4, "--max_eval_samples", 8, *split_words(cfg.flags))
            losses, weights = [step["loss"] for step in steps], load_file(out / "model.safetensors")
            first = first or (losses, weights)
            differences = (max(abs(a / b - 1) for a, b in zip(losses, first[0], strict=True)),
                           max(float(torch.linalg.norm(weights[name] - tensor) / torch.linalg.norm(tensor))
                               for name, tensor in first[1].items()))
            largest = tuple(map(max, largest, differences))
            print(f"{' '.join(map(str, stage[1:])):<12} {processes:>9} {result['peak_memory_bytes'] / 2**30:8.2f}G "
                  f"{result['tokens_per_s']:>9,.0f} {differences[0]:9.1e} {differences[1]:9.1e}", flush=True)
    print(f"largest relative difference of losses {largest[0]:.1e}, of weights {largest[1]:.1e}")


if __name__ == "__main__":
    run((ZeroBenchConfig, main), __doc__)
