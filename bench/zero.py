"""The ZeRO stages beside one another: the same losses and weights, and the memory that each takes.

    python bench/zero.py --data data/prepared/sample/simp.json --folder /tmp/zero          the size small, in fp32
    python bench/zero.py --data … --folder … --checkpoint DIR                              a checkpoint of one's own

Fine-tunes for 20 steps under ZeRO 0, 1, 2, 3 and 3 with offload, with one and two processes each. `losses` is the
largest relative difference of a step's loss from the first run's, `weights` the largest norm of a saved tensor's
difference over the tensor's own norm.
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import small_checkpoint, train
from common.files import read_json, read_json_lines
from common.settings import run, setting
from pipeline.jobs import words


@dataclass(frozen=True)
class ZeroBenchSettings:
    """Settings of the comparison."""
    data: str | None = setting(None, "preprocessed file of the task simp")
    folder: str | None = setting(None, "folder to work in")
    checkpoint: str | None = setting(None, "checkpoint to fine-tune; none: random weights of the size small")
    steps: int = setting(20, "steps")
    flags: str = setting("", "more flags for train.py, such as '--method vcl --learning_rate 0.1'")

    def problems(self):
        return [f"--{name} is missing" for name in ("data", "folder") if not getattr(self, name)]


def main(cfg):
    """Prints a line for each run, and the largest differences."""
    checkpoint = cfg.checkpoint or small_checkpoint(Path(cfg.folder))
    out, first, worst = Path(cfg.folder) / "run", None, (0.0, 0.0)
    print(f"{'ZeRO':<12} {'processes':>9} {'memory':>9} {'tokens/s':>9} {'losses':>9} {'weights':>9}")
    for stage in (["--zero", 0], ["--zero", 1], ["--zero", 2], ["--zero", 3], ["--zero", 3, "--offload"]):
        for processes in (1, 2):
            shutil.rmtree(out, ignore_errors=True)
            train(processes, "--init", checkpoint, "--data", cfg.data, "--out", out, *stage, "--dtype", "fp32",
                  "--max_steps", cfg.steps, "--learning_rate", 3e-4, "--max_eval_samples", 8, *words(cfg.flags))
            losses = [line["loss"] for line in read_json_lines(out / "metrics.jsonl") if "loss" in line]
            weights, result = load_file(out / "model.safetensors"), read_json(out / "run.json")["result"]
            first = first or (losses, weights)
            apart = (max(abs(a / b - 1) for a, b in zip(losses, first[0], strict=True)),
                     max(float(torch.linalg.norm(weights[name] - tensor) / torch.linalg.norm(tensor))
                         for name, tensor in first[1].items()))
            worst = tuple(map(max, worst, apart))
            print(f"{' '.join(map(str, stage[1:])):<12} {processes:>9} {result['peak_memory_bytes'] / 2**30:8.2f}G "
                  f"{result['tokens_per_s']:>9,.0f} {apart[0]:9.1e} {apart[1]:9.1e}", flush=True)
    print(f"largest relative difference of losses {worst[0]:.1e}, of weights {worst[1]:.1e}")


if __name__ == "__main__":
    run((ZeroBenchSettings, main), __doc__)
